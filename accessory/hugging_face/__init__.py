"""Models for transformers: its Trainer, its `generate`, and side networks beside what it loaded; see docs/python.md."""

from __future__ import annotations

from accessory.hugging_face.causal_lm import QSTForCausalLM, QSTLlamaForCausalLM, QSTOPTForCausalLM
from accessory.hugging_face.config import QSTConfig
from accessory.hugging_face.forward import CausalOutput

__all__ = [
    "AccessoryForCausalLM",
    "CausalOutput",
    "QSTConfig",
    "QSTForCausalLM",
    "QSTLlamaForCausalLM",
    "QSTOPTForCausalLM",
]


def __getattr__(name: str) -> object:
    """`AccessoryForCausalLM`, which alone imports transformers: the other classes do without."""
    if name != "AccessoryForCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from accessory.hugging_face.accessory_lm import AccessoryForCausalLM

    return AccessoryForCausalLM
