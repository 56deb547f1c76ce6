"""Text to token ids and back, whatever file the vocabulary comes in."""

from accessory.tokenizer.added import with_added_tokens
from accessory.tokenizer.base import Tokenizer
from accessory.tokenizer.chat import Chat
from accessory.tokenizer.opening import holds_tokenizer, open_tokenizer

__all__ = ["Chat", "Tokenizer", "holds_tokenizer", "open_tokenizer", "with_added_tokens"]
