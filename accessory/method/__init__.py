"""What is trained. A method is the last part of `--llama_type` (`llama_peft`) or absent (`llama`: full fine-tuning)."""

from __future__ import annotations

from accessory.method.adapter import Adapter
from accessory.method.base import Attachment, IntegerRule, Method
from accessory.method.full import Full
from accessory.method.peft import QUANT_TARGETS, Peft
from accessory.method.qsft import Qsft
from accessory.method.side_tuning import SideTuning

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "peft": Peft,
    "adapter": Adapter,
    "qst": SideTuning,
    "qsft": Qsft,
}


def presets() -> dict[str, Method]:
    """What tools take as `--method`: a name for each method with certain settings."""
    return {
        name: method(method.Settings(**settings))
        for method in METHODS.values()
        for name, settings in method.presets.items()
    }


def setting_names() -> set[str]:
    """Keys of all methods' settings."""
    return set().union(*(method.Settings.model_fields for method in METHODS.values()))


__all__ = ["METHODS", "QUANT_TARGETS", "Attachment", "IntegerRule", "Method", "presets", "setting_names"]
