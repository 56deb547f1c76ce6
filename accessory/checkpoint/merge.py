"""Adds a trained part to its base: LoRA and scales into the matrices, biases and norms in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from accessory.checkpoint.lazy import ComputedTensor, LazyTensor, PackedTensor, cut
from accessory.checkpoint.naming import BLOCK_LINEAR, Tensors
from accessory.errors import CheckpointError
from accessory.method.peft import Peft
from accessory.model.args import ModelArgs
from accessory.quant import PackedWeight, storage
from accessory.quant.packed import PackedState

_SWITCHES = {"qkv_bias": ("wq", "wk", "wv"), "out_bias": ("wo",), "mlp_bias": ("w1", "w2", "w3")}
"""Setting of a model -> the linears that it gives a bias."""


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
        return cut(super().read(), dim, start, stop)


def with_lora(weight: LazyTensor, a: LazyTensor, b: LazyTensor, scale: float) -> LazyTensor:
    """W + scale B A in fp32, with W [N, K], A [R, K] and B [N, R]."""

    def compute(dim: int | None, start: int, stop: int) -> Tensor:  # rows need those of B alone, columns those of A
        """Rows or columns start to stop of the sum, fp32; dim None: all of it."""
        right = a.read(1, start, stop) if dim == 1 else a.read()
        left = b.read(0, start, stop) if dim == 0 else b.read()
        base = weight.read(dim, start, stop).to(torch.float32, copy=True)
        return base.addmm_(left.float(), right.float(), alpha=scale)

    return ComputedTensor(weight.shape, weight.dtype, compute)


def with_scale(tensor: LazyTensor, scale: LazyTensor) -> LazyTensor:
    """diag(s) W in fp32, with W [N, K] and s [N]; or s b, with b [N]."""

    def compute(dim: int | None, start: int, stop: int) -> Tensor:
        """Rows or columns start to stop of the product, fp32; dim None: all of it."""
        factor = (scale.read(0, start, stop) if dim == 0 else scale.read()).float()
        value = tensor.read(dim, start, stop).float()
        return value * (factor[:, None] if value.dim() == 2 else factor)

    return ComputedTensor(tensor.shape, tensor.dtype, compute)


def repacked(
    tensors: Tensors,
    quant_type: str,
    is_linear: Callable[[str], object] = BLOCK_LINEAR.fullmatch,
    storages: Mapping[str, type[PackedWeight]] = MappingProxyType({}),
) -> Tensors:
    """A base with every matrix of the blocks packed, as a run does that packs while it loads.

    `is_linear` tells these matrices by name; storages: linear -> how it is packed, if not as `quant_type` says. What is
    packed already stays as it is.
    """
    kind = storage(quant_type)
    return {
        name: RepackedTensor({}, storages.get(name.removesuffix(".weight"), kind), tensor.shape, name, inner=tensor)
        if is_linear(name) and not isinstance(tensor, PackedTensor)
        else tensor
        for name, tensor in tensors.items()
    }


def with_trained_parts(
    tensors: Tensors, storage_of: Callable[[type[PackedWeight]], type[PackedWeight]], *, rounded: bool
) -> Tensors:
    """Put trained parts, which `tensors` has by names of their own, into the packed matrices they belong to.

    storage_of: `Method.storage_of` of what trained them. rounded: to the type that files have the parts in; else they
    stay as they were trained.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        kind = storage_of(tensor.storage) if isinstance(tensor, PackedTensor) else None
        parts = (*kind.trained, *kind.moved) if kind else ()
        if trained := {part: found.pop(f"{name}.{part}") for part in parts if f"{name}.{part}" in found}:
            if rounded:
                trained |= {part: _in_dtype(trained[part], kind.filed.PARTS[part].dtype, f"{name}.{part}")
                            for part in kind.trained if part in trained}  # fmt: skip
            stored = {part: value for part, value in tensor.parts.items() if part in kind.filed.PARTS}
            found[name] = replace(tensor, storage=kind.filed, parts=stored, trained=trained)
    return found


def _in_dtype(tensor: LazyTensor, dtype: torch.dtype, name: str) -> LazyTensor:
    """`tensor` rounded to `dtype`. Reading it raises `CheckpointError` where a number is beyond it."""

    def compute(*span: int | None) -> Tensor:
        """The range `span`, rounded."""
        value = tensor.read(*span).to(dtype)
        if not value.isfinite().all():
            kind = str(dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} was trained beyond {torch.finfo(dtype).max:g}, the largest {kind} number.")
        return value

    return ComputedTensor(tensor.shape, str(dtype).removeprefix("torch."), compute)


def unpacked(tensors: Tensors) -> Tensors:
    """A base whose packed matrices are read as plain ones (fp32), so that no writer keeps them packed."""
    return {
        name: ComputedTensor(tensor.shape, "float32", tensor.read) if isinstance(tensor, PackedTensor) else tensor
        for name, tensor in tensors.items()
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
        if ".lora_" in name or leaf == "scale":
            continue
        if leaf == "bias" and drop_biases and not base_has_bias(module, args):
            continue
        a, b = tensors.get(f"{module}.lora_a.weight"), tensors.get(f"{module}.lora_b.weight")
        if leaf == "weight" and (a or b):
            if not (a and b):
                raise CheckpointError(f"{module}: has only one of lora_a and lora_b.")
            tensor = with_lora(tensor, a, b, settings.lora_scale)
        if scale := tensors.get(f"{module}.scale"):
            tensor = with_scale(tensor, scale)
        kept[name] = tensor
    return args.model_copy(update=_bias_switches(kept)), kept


def base_has_bias(module: str, args: ModelArgs) -> bool:
    """Whether a model of these settings has a bias at `module`, one of our names that may have one."""
    leaf = module.rsplit(".", 1)[-1]
    switch = next((switch for switch, linears in _SWITCHES.items() if leaf in linears), None)
    return switch is None or getattr(args, switch)  # others are norms, whose biases are the base's


def _bias_switches(tensors: Tensors) -> dict[str, bool]:
    biased = {name.split(".")[-2] for name in tensors if name.endswith(".bias") and name.startswith("layers.")}
    return {switch: not biased.isdisjoint(linears) for switch, linears in _SWITCHES.items()}
