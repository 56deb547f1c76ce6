"""What GPTQ's, AWQ's and GreenBit's files have in common: matrices of whole numbers, whose groups have statistics."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.formats.int_words import numbers_of
from accessory.checkpoint.lazy import ComputedTensor, HeldTensor, LazyTensor, cut, finite
from accessory.errors import CheckpointError, nearest
from accessory.quant.groups import BITS, packed_codes

Parts = dict[str, LazyTensor]


class Files:
    """The tensors of a checkpoint by their names, of which the parts of packed matrices are taken out one by one."""

    def __init__(self, tensors: dict[str, LazyTensor], path: Path) -> None:
        self.tensors, self.path = dict(tensors), path

    def packed(self) -> list[str]:
        """Names of the linears that have a `qweight`, in file order."""
        return [key.removesuffix(".qweight") for key in self.tensors if key.endswith(".qweight")]

    def take(self, linear: str, part: str, dtypes: tuple[str, ...], dims: int) -> LazyTensor:
        """The part of a linear, which is left out from now on.

        Raises `CheckpointError` where it is missing, or has another type or number of dimensions.
        """
        key = f"{linear}.{part}"
        if key not in self.tensors:
            there = ", ".join(k for k in self.tensors if k.startswith(f"{linear}.")) or "none of its parts"
            raise CheckpointError(f"{self.path}: {key} is missing; found {there}.{nearest(key, self.tensors)}")
        tensor = self.tensors.pop(key)
        if tensor.dtype.lower() not in {name.lower() for name in dtypes} or len(tensor.shape) != dims:
            raise CheckpointError(
                f"{self.path}: {key} is {tensor.dtype} {list(tensor.shape)}; expected {dtypes[0]} of {dims} dimensions."
            )
        return tensor

    def holds(self, linear: str, part: str) -> bool:
        """Whether a linear has the part."""
        return f"{linear}.{part}" in self.tensors

    def error(self, linear: str, part: str, found: object, expected: object) -> CheckpointError:
        """For a part that is not what it should be."""
        return CheckpointError(f"{self.path}: {linear}.{part} {found}; expected {expected}.")


INTEGERS, HALVES = ("I32", "int32"), ("F16", "float16", "BF16", "bfloat16", "F32", "float32")
"""Types as safetensors and torch name them."""


def checked_bits(files: Files, linear: str, bits: float, *more: int) -> int:
    """The bits of a linear's numbers. Raises `CheckpointError` unless a storage has them or they are in `more`."""
    if bits not in (*BITS, *more):
        expected = f"{', '.join(map(str, (*BITS, *more)))} bits, or the full-precision checkpoint and --quant"
        raise files.error(linear, "qweight", f"holds numbers of {bits:g} bits", expected)
    return int(bits)


def codes_of_words(words: LazyTensor, bits: int, order: Tensor | None = None) -> Parts:
    """The `codes` (and `high`) of a matrix from `words` [K bits / 32, N], whose numbers run down the columns.

    order: int64 [K], which of the numbers comes first, second and so on.
    """
    rows, columns = words.shape[1], words.shape[0] * 32 // bits
    if bits == 3 or order is not None:
        return codes_of_numbers(lambda: _in_order(numbers_of(words.read(), bits), order), (rows, columns), bits)
    shape = rows, columns * bits // 8
    return {"codes": computed(shape, "uint8", lambda: words.read().t().contiguous().view(torch.uint8))}


def codes_of_numbers(numbers: Callable[[], Tensor], shape: tuple[int, int], bits: int) -> Parts:
    """The `codes` (and `high`) of a matrix of `shape` [N, K], whose numbers `numbers` gives: uint8 [N, K]."""
    (rows, columns), width = shape, 2 if bits == 4 else 4
    parts = {"codes": computed((rows, -(-columns // width)), "uint8", lambda: packed_codes(numbers(), bits)["codes"])}
    if bits == 3:
        high = rows, -(-columns // 8)
        parts["high"] = computed(high, "uint8", lambda: packed_codes(numbers(), bits)["high"])
    return parts


def by_rows(tensor: LazyTensor, name: str) -> LazyTensor:
    """Statistics [G, N] -> fp16 [N, G].

    Reading raises `CheckpointError` for numbers that are not finite, or that fp16 cannot hold exactly.
    """

    def read() -> Tensor:
        """All of them."""
        stored = finite(tensor.read(), name)
        half = stored.half()
        if not torch.equal(half.to(stored.dtype), stored):
            raise CheckpointError(f"{name} holds {tensor.dtype} numbers that fp16 does not have; expected fp16.")
        return half.t().contiguous()

    return computed((tensor.shape[1], tensor.shape[0]), "float16", read)


def channels_by_group(files: Files, linear: str, index: Tensor) -> tuple[Tensor | None, int]:
    """(the channels by group, int64 [K], or None where they lie so already; channels of a group).

    index: `g_idx`, the group of each channel, int64 [K]. Raises `CheckpointError` for groups of unequal sizes.
    """
    group = int(torch.bincount(index).max())
    wanted = torch.arange(len(index)) // group
    if torch.equal(index, wanted):
        return None, group
    order = torch.argsort(index, stable=True)
    if not torch.equal(index[order], wanted):
        raise files.error(linear, "g_idx", "has groups of unequal sizes", f"{group} channels in each but the last")
    return order, group


def column_order(order: Tensor) -> Parts:
    """`order` (whole numbers [K]) as a part, where it is another than that of the channels."""
    if torch.equal(order.long(), torch.arange(len(order))):
        return {}
    return {"order": HeldTensor(order.int())}


def computed(shape: tuple[int, ...], dtype: str, whole: Callable[[], Tensor]) -> LazyTensor:
    """A tensor that is always computed whole."""
    return ComputedTensor(shape, dtype, lambda *span: cut(whole(), *span))


def _in_order(numbers: Tensor, order: Tensor | None) -> Tensor:
    return numbers if order is None else numbers[:, order]
