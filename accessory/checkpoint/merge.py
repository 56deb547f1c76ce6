"""Adds a trained part to its base: LoRA into the matrices, biases and norms in their places."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accessory.checkpoint.lazy import DerivedTensor, LazyTensor, PackedTensor
from accessory.checkpoint.naming import BLOCK_LINEAR, Tensors
from accessory.errors import CheckpointError
from accessory.method.peft import Peft
from accessory.model.args import ModelArgs
from accessory.quant import storage
from accessory.quant.packed import PackedState

_QKV, _OUT, _MLP = ("wq", "wk", "wv"), ("wo",), ("w1", "w2", "w3")


@dataclass(frozen=True)
class RepackedTensor(PackedTensor):
    """A full-precision matrix, packed when it is read: what a run that packed it was trained on."""

    inner: LazyTensor | None = None

    def stored(self) -> PackedState:
        """The parts, packed anew."""
        matrix = self.storage(self.inner.shape)
        matrix.pack(self.inner.read())
        return {part: value.detach() for part, value in matrix.named_parameters()}

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Pack the whole matrix, since blocks may cross the edge of a range, and cut the range out of it; fp32."""
        values = super().read()
        return values if dim is None else values.narrow(dim, start, stop - start).contiguous()


@dataclass(frozen=True)
class UnpackedTensor(DerivedTensor):
    """A packed matrix that writers see as a plain one, so that they do not keep it packed."""

    dtype: str = "float32"

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Dequantize to fp32."""
        return self.inner.read(dim, start, stop)


@dataclass(frozen=True)
class MergedTensor(DerivedTensor):
    """W + scale B A in fp32, with W [N, K] (`inner`), A [R, K] and B [N, R]."""

    a: LazyTensor
    b: LazyTensor
    scale: float

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """A range of rows needs those of B alone, one of columns those of A."""
        a = self.a.read(1, start, stop) if dim == 1 else self.a.read()
        b = self.b.read(0, start, stop) if dim == 0 else self.b.read()
        weight = self.inner.read(dim, start, stop).to(torch.float32, copy=True)
        return weight.addmm_(b.float(), a.float(), alpha=self.scale)


def repacked(tensors: Tensors, quant_type: str) -> Tensors:
    """The base as it was in training: every matrix of the blocks packed."""
    kind = storage(quant_type)
    return {
        name: RepackedTensor({}, kind, tensor.shape, name, inner=tensor) if BLOCK_LINEAR.fullmatch(name) else tensor
        for name, tensor in tensors.items()
    }


def with_trained_parts(tensors: Tensors) -> Tensors:
    """Put trained parts, which `tensors` has by names of their own, into the packed matrices they belong to."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        parts = tensor.storage.trained if isinstance(tensor, PackedTensor) else ()
        if trained := {part: found.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in found}:
            found[name] = replace(tensor, trained=trained)
    return found


def unpacked(tensors: Tensors) -> Tensors:
    """A base whose packed matrices are read as plain ones."""
    return {
        name: UnpackedTensor(tensor) if isinstance(tensor, PackedTensor) else tensor for name, tensor in tensors.items()
    }


def merged(
    tensors: Tensors, args: ModelArgs, settings: Peft.Settings, *, drop_biases: bool
) -> tuple[ModelArgs, Tensors]:
    """(settings, tensors) of the whole model, from base and trained part laid over each other in `tensors`.

    With `drop_biases`, biases that training added are left out. Raises `CheckpointError` for half a LoRA.
    """
    kept: Tensors = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        if leaf == "bias" and drop_biases and not _base_has_bias(module, args):
            continue
        a, b = tensors.get(f"{module}.lora_a.weight"), tensors.get(f"{module}.lora_b.weight")
        if leaf == "weight" and (a or b):
            if not (a and b):
                raise CheckpointError(f"{module}: has only one of lora_a and lora_b.")
            tensor = MergedTensor(tensor, a, b, settings.lora_scale)
        kept[name] = tensor
    return args.model_copy(update=_bias_switches(kept)), kept


def _base_has_bias(module: str, args: ModelArgs) -> bool:
    groups = ((_QKV, args.qkv_bias), (_OUT, args.out_bias), (_MLP, args.mlp_bias))
    biased = {name: has_bias for names, has_bias in groups for name in names}
    return biased.get(module.rsplit(".", 1)[-1], True)  # others are norms, whose biases are the base's


def _bias_switches(tensors: Tensors) -> dict[str, bool]:
    biased = {name.split(".")[-2] for name in tensors if name.endswith(".bias") and name.startswith("layers.")}
    return {
        "qkv_bias": not biased.isdisjoint(_QKV),
        "out_bias": not biased.isdisjoint(_OUT),
        "mlp_bias": not biased.isdisjoint(_MLP),
    }
