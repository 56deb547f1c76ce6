"""Text to token ids and back, whatever file the vocabulary comes in."""

from accessory.tokenizer.base import StatedTokenizer, Tokenizer
from accessory.tokenizer.chat import Chat
from accessory.tokenizer.opening import holds_tokenizer, open_tokenizer, same_tokenizer

__all__ = ["Chat", "StatedTokenizer", "Tokenizer", "holds_tokenizer", "open_tokenizer", "same_tokenizer"]
