"""Quantized supervised fine-tuning (QSFT): the quantized weights themselves are trained, and stay as few bits.

A scale and a zero for each group of weights learn, as in PEQA (Kim et al. 2023) and the last phase of EfficientQAT
(Chen et al. 2024); the integers stay.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from accessory.errors import ConfigError
from accessory.method.base import Attachment, Method
from accessory.method.peft import Peft
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.quant import PackedWeight, storage
from accessory.quant.groups import GroupWeight
from accessory.quant.trained_groups import TrainedStatistics, with_trained_statistics

_EXPECTED = "int2_g64, int3_g64, mix2.5 and the like"


class Qsft(Method):
    """Trains scales and zeros of every linear that is packed as integers in groups."""

    class Settings(BaseModel):
        """Keys of `--llama_config` that belong to this method."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        tune: Literal["statistics"] = "statistics"
        """What of the quantized weights is trained: scales and zeros of all groups."""

    suffix: ClassVar[str] = "_qsft"
    summary: ClassVar[str] = "scales and zeros of weights packed as int2_g64, int3_g64, mix2.5 and the like"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"qsft": {}}
    adapter_fault: ClassVar[str] = "scales and zeros of the base were trained, for which PEFT has no place"

    @classmethod
    def storage_fault(cls, quant_type: str) -> str | None:
        """Integers in groups alone have both."""
        if issubclass(storage(quant_type), GroupWeight):
            return None
        return f"it trains scales and zeros of integers in groups ({_EXPECTED}), which {quant_type} has not"

    @classmethod
    def storage_of(cls, kind: type[PackedWeight]) -> type[PackedWeight]:
        """See `Method.storage_of`: with fp32 statistics, which are trained."""
        return with_trained_statistics(kind) if issubclass(kind, GroupWeight) else kind

    @property
    def mergeable(self) -> Peft.Settings:
        """Nothing has LoRA."""
        return Peft.Settings()

    def attach(self, decoder: Decoder) -> Attachment:
        """Train all statistics. Raises `ConfigError` where no linear has any."""
        weights = {name: module.weight for name, module in decoder.named_modules() if isinstance(module, Linear)}
        tuned = {name: weight for name, weight in weights.items() if isinstance(weight, TrainedStatistics)}
        if not tuned:
            raise ConfigError(
                f"--llama_type ...{self.suffix} trains a quantized base, and this one is not packed as integers in "
                f"groups: give --quant --quant_type {_EXPECTED}, or a base that tools/quantize.py made."
            )
        return Attachment({f"{name}.weight.{part}" for name, weight in tuned.items() for part in weight.trained})
