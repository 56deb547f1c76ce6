"""What is trained. A method is the last part of `--llama_type` (`llama_peft`) or absent (`llama`: full fine-tuning)."""

from __future__ import annotations

from accessory.method.base import Attachment, Method
from accessory.method.full import Full
from accessory.method.peft import Peft

METHODS: dict[str, type[Method]] = {"full": Full, "peft": Peft}

__all__ = ["METHODS", "Attachment", "Method"]
