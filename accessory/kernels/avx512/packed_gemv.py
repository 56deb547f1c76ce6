"""Products of few rows in bf16 with packed matrices, with their biases and LoRA: most of decoding."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64
from typing import ClassVar, Generic

import torch
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.avx512.packed_products import M
from accessory.kernels.operands import address, as_fp32, contiguous

MOST_ROWS = 48  # for more, unpacking a matrix once and multiplying plainly is as fast


class PackedMatrices(Generic[M]):
    """Several W [n, k] of a format that multiply the same x [T, k], in one call, by its C function `NAME`.

    Everything is summed in fp32 and rounded once. A row's result has the same bits whatever the other rows are.
    """

    NAME: ClassVar[str]
    IN_C: ClassVar[Callable]
    """Makes the C structure of a matrix."""

    def __init__(self, matrices: list[M]) -> None:
        if len({matrix.shape[1] for matrix in matrices}) != 1:
            raise AssertionError(
                f"matrices of {[tuple(matrix.shape) for matrix in matrices]}; expected as many columns in each"
            )
        self._kept = matrices
        in_c = [type(self).IN_C(matrix) for matrix in matrices]
        self._in_c = (type(in_c[0]) * len(in_c))(*in_c)
        self.columns = matrices[0].shape[1]
        self.widths = [matrix.shape[0] for matrix in matrices]
        self.width = sum(self.widths)

    def __reduce__(self) -> tuple[type[PackedMatrices], tuple[list[M]]]:
        """A copy gets the copied tensors' addresses."""
        return type(self), (self._kept,)

    def takes(self, x: Tensor) -> bool:
        """Whether they are for x: bf16 on a CPU, and few rows."""
        return x.is_cpu and x.dtype == torch.bfloat16 and x.shape[0] <= MOST_ROWS

    def multiply(self, x: Tensor, added: list[Addition] | None = None) -> tuple[Tensor, ...]:
        """x bf16 [T, k] -> [T, n] of each, with bias and LoRA, no dropout. Raises `AssertionError` for other shapes."""
        rows = x.shape[0]
        x = contiguous(x, (rows, self.columns), "x")
        out = x.new_empty(rows, self.width)
        more, kept = self._added_in_c(added) if added else (None, None)  # `kept` until the call is over
        compiled(self.NAME, "ppnppnn")(
            self._in_c, more, len(self.widths), address(x), address(out), rows, torch.get_num_threads()
        )
        del kept
        return (out,) if len(self.widths) == 1 else out.split_with_sizes(self.widths, 1)

    def _added_in_c(self, added: list[Addition]) -> tuple[ctypes.Array[_BiasAndLora], list[Tensor]]:
        if len(added) != len(self.widths):
            raise AssertionError(f"{len(added)} biases and LoRAs for {len(self.widths)} matrices")
        table, kept = (_BiasAndLora * len(added))(), []
        for to, one, n in zip(table, added, self.widths, strict=True):
            if one.bias is not None:
                kept.append(as_fp32(one.bias, (n,), "bias"))
                to.bias = address(kept[-1])
            if one.a is not None:
                rank = one.a.shape[0]
                kept += as_fp32(one.a, (rank, self.columns), "a"), as_fp32(one.b, (n, rank), "b")
                to.a, to.b, to.rank, to.scale = address(kept[-2]), address(kept[-1]), rank, one.scale
        return table, kept


class _BiasAndLora(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in ("bias", "a", "b")), ("rank", c_int64), ("scale", ctypes.c_float))


__all__ = ["MOST_ROWS", "PackedMatrices"]
