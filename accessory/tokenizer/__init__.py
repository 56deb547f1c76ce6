"""Text to token ids and back, whatever file the vocabulary comes in."""

from accessory.tokenizer.base import Tokenizer
from accessory.tokenizer.opening import open_tokenizer

__all__ = ["Tokenizer", "open_tokenizer"]
