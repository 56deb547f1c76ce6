"""Decoding over a key/value cache, a batch of prompts at once."""

from accessory.generate.kept import KeptCache
from accessory.generate.logits import next_token_logits
from accessory.generate.prompts import Embed, read_prompts
from accessory.generate.tokens import generate_tokens

__all__ = ["Embed", "KeptCache", "generate_tokens", "next_token_logits", "read_prompts"]
