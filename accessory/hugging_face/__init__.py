"""Side tuning of a model that transformers loaded, in a loop of one's own or in its Trainer; see docs/python.md."""

from __future__ import annotations

from accessory.hugging_face.causal_lm import (
    CausalOutput,
    QSTForCausalLM,
    QSTLlamaForCausalLM,
    QSTOPTForCausalLM,
)
from accessory.hugging_face.config import QSTConfig

__all__ = ["CausalOutput", "QSTConfig", "QSTForCausalLM", "QSTLlamaForCausalLM", "QSTOPTForCausalLM"]
