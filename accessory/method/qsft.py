"""Quantized supervised fine-tuning (QSFT): the quantized weights themselves are trained, and stay as few bits.

Scales and zeros of groups of weights learn, as in PEQA (Kim et al. 2023) and the last phase of EfficientQAT (Chen et
al. 2024); whole numbers move by ones (see `accessory.run.integer_moves`), which GreenBit's Q-SFT is meant to do.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from accessory.errors import ConfigError, ParallelError
from accessory.method.base import Attachment, IntegerRule, Method
from accessory.method.peft import Peft
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import WHOLE, mark, reduce_over_model_parallel, slicing_of
from accessory.quant import PackedWeight, storage
from accessory.quant.groups import GroupWeight
from accessory.quant.moving_groups import BASIS, WISH, MovingIntegers, Wish, with_moving_integers
from accessory.quant.trained_groups import with_trained_statistics

_EXPECTED = "int2_g64, int3_g64, mix2.5 and the like"


class Qsft(Method):
    """Trains scales, zeros and whole numbers of every linear that is packed as integers in groups."""

    class Settings(BaseModel):
        """Keys of `--llama_config` that belong to this method."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

        tune: Literal["statistics", "integers", "quantized", "all"] = "statistics"
        """What is trained: `statistics` (scales and zeros of all groups), `integers`, `quantized` (both), or `all`:
        these, and embeddings, norms, biases and head."""
        rule: Literal["gated", "diode"] = "gated"
        """How integers move: `gated` (tried, and kept if the loss falls), or `diode`, the rule that GreenBit released,
        to compare with."""
        most_moved: float = Field(2e-5, gt=0, le=0.01)
        """The share of a matrix's integers that may move at a time, at most one of a row."""
        move_every: int = Field(4, ge=1)
        """Optimizer steps from one proposal of moves to the next."""
        lr_2bit: float = Field(1.0, ge=0)
        """The learning rate of displacements of 2-bit integers, in steps of the matrix's grid times `galore_scale`; the
        schedule of `--lr` applies."""
        lr_3bit: float = Field(1.0, ge=0)
        """The same for 3 bits."""
        lr_4bit: float = Field(1.0, ge=0)
        """The same for 4 bits."""
        lr_fp: float = Field(5e-6, ge=0)
        """The learning rate of embeddings, norms, biases and head, where `tune` is `all`."""
        galore_rank: int = Field(64, ge=1)
        """The rank at which displacements are kept."""
        galore_update_proj_gap: int = Field(50, ge=1)
        """Optimizer steps from one basis to the next."""
        galore_scale: float = Field(0.25, gt=0)
        """What displacements are multiplied by."""
        galore_proj_type: Literal["uncut", "std", "reverse_std", "right", "left"] = "uncut"
        """Which side of a matrix is projected: its columns (`right`), its rows (`left`), the smaller (`std`), the
        larger (`reverse_std`), or the one that tensor parallelism leaves whole (`uncut`), which alone can be cut."""

    suffix: ClassVar[str] = "_qsft"
    summary: ClassVar[str] = "the quantized weights themselves, packed as int2_g64, int3_g64, mix2.5 and the like"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"qsft": {}, "qsft_quantized": {"tune": "quantized"}}
    vision_fault: ClassVar[str] = "it trains matrices of the blocks, and what turns images into rows would stay"
    adapter_fault: ClassVar[str] = "the base's quantized weights were trained, for which PEFT has no place"

    @classmethod
    def storage_fault(cls, quant_type: str) -> str | None:
        """Integers in groups alone have what it trains."""
        if cls.tunes(storage(quant_type)):
            return None
        return f"it trains integers in groups, their scales and zeros ({_EXPECTED}), which {quant_type} has not"

    @classmethod
    def tunes(cls, kind: type[PackedWeight]) -> bool:
        """See `Method.tunes`."""
        return issubclass(kind, GroupWeight)

    def storage_of(self, kind: type[PackedWeight]) -> type[PackedWeight]:
        """See `Method.storage_of`: with fp32 statistics and integers that move, as far as they are trained."""
        if not self.tunes(kind):
            return kind
        statistics = self.settings.tune != "integers"
        if self.settings.tune == "statistics":
            return with_trained_statistics(kind)
        return with_moving_integers(kind, statistics)

    @property
    def mergeable(self) -> Peft.Settings:
        """Nothing has LoRA."""
        return Peft.Settings()

    @property
    def trains_vocabulary(self) -> bool:
        """Where all is trained."""
        return self.settings.tune == "all"

    @property
    def integer_rule(self) -> IntegerRule | None:
        """See `Method.integer_rule`."""
        settings = self.settings
        if settings.tune == "statistics":
            return None
        return IntegerRule(
            gated=settings.rule == "gated", most_moved=settings.most_moved, every=settings.move_every,
            basis_every=settings.galore_update_proj_gap, scale=settings.galore_scale,
        )  # fmt: skip

    def attach(self, decoder: Decoder) -> Attachment:
        """Train what `tune` says. Raises `ConfigError` where no linear has integers in groups."""
        tuned = {f"{name}.weight": linear.weight for name, linear in _tuned(decoder, GroupWeight).items()}
        if not tuned:
            raise ConfigError(
                f"--llama_type ...{self.suffix} trains a quantized base, and this one is not packed as integers in "
                f"groups: give --quant --quant_type {_EXPECTED}, or a base that tools/quantize.py made."
            )
        attachment = Attachment({f"{name}.{part}" for name, weight in tuned.items() for part in weight.trained})
        attachment.moved = {f"{name}.{part}" for name, weight in tuned.items() for part in weight.moved}
        if self.settings.tune == "all":
            attachment.trainable |= set(_train_plain(decoder))
        return attachment

    def prepare_training(self, decoder: Decoder, attachment: Attachment) -> None:
        """See `Method.prepare_training`: displacements and their bases. Raises `ParallelError` for a cut projection."""
        for name, linear in _tuned(decoder, MovingIntegers).items():
            linear.weight.keep_wish(
                Wish(self.settings.galore_rank, self._projects_columns(linear), self.settings.galore_scale)
            )
            attachment.trainable.add(f"{name}.weight.{WISH}")
            attachment.working |= {f"{name}.weight.{WISH}": linear.weight.slicing, f"{name}.weight.{BASIS}": WHOLE}

    def _projects_columns(self, linear: Linear) -> bool:
        columns_whole = linear.cut == "column"
        larger_rows = linear.out_features >= linear.in_features
        chosen = {
            "uncut": columns_whole, "right": True, "left": False, "std": larger_rows, "reverse_std": not larger_rows,
        }[self.settings.galore_proj_type]  # fmt: skip
        if linear.ranks > 1 and chosen != columns_whole:
            raise ParallelError(
                f"--model_parallel_size {linear.ranks} cuts the side of a matrix that galore_proj_type "
                f"{self.settings.galore_proj_type!r} projects. Leave galore_proj_type out, or give 1."
            )
        return chosen

    def rates(self, decoder: Decoder, lr: float) -> dict[str, float]:
        """See `Method.rates`: statistics learn in steps of their matrix's grid."""
        weights = {f"{name}.weight": linear.weight for name, linear in _tuned(decoder, GroupWeight).items()}
        sizes = torch.tensor([weight.step_size for weight in weights.values()], dtype=torch.float64)
        reduce_over_model_parallel(sizes)
        ranks = dist.get_world_size(model_parallel_group())
        found = {}
        for (name, weight), size in zip(weights.items(), (sizes / ranks).tolist(), strict=True):
            weight.step_size = size
            found |= dict.fromkeys((f"{name}.scales", f"{name}.zeros"), size)
            found[f"{name}.{WISH}"] = getattr(self.settings, f"lr_{weight.bits}bit") / lr
        if self.settings.tune == "all":
            found |= dict.fromkeys(_plain(decoder), self.settings.lr_fp / lr)
        return found


def _tuned(decoder: Decoder, kind: type[GroupWeight]) -> dict[str, Linear]:
    """Name -> linear, of those whose weight is of this kind."""
    linears = {name: module for name, module in decoder.named_modules() if isinstance(module, Linear)}
    return {name: linear for name, linear in linears.items() if isinstance(linear.weight, kind)}


def _plain(decoder: Decoder) -> dict[str, nn.Module]:
    """Name -> the module that has it, of parameters that are no part of a packed matrix."""
    return {
        f"{name}.{leaf}".lstrip("."): module
        for name, module in decoder.named_modules()
        if not isinstance(module, PackedWeight)
        for leaf, _ in module.named_parameters(recurse=False)
    }


def _train_plain(decoder: Decoder) -> list[str]:
    """Keep all plain parameters in fp32; returns their names."""
    found = _plain(decoder)
    for name, module in found.items():
        leaf = name.rpartition(".")[2]
        parameter = getattr(module, leaf)
        setattr(module, leaf, mark(nn.Parameter(parameter.detach().float()), slicing_of(parameter)))
    return list(found)
