"""The two factors of one linear's LoRA, unread: A [R, in], B [out, R], and the ways to make them fit another rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.checkpoint.lazy import ComputedTensor, LazyTensor, cut, zeros
from accessory.checkpoint.load import named_generator
from accessory.method.peft import truncated_normal


def random_rows(first: LazyTensor | None, shape: tuple[int, int], name: str) -> LazyTensor:
    """A [R, in] (fp32): its `first` rows, if there are any, and below them those of a new LoRA, seeded by `name`.

    With zeros in the same columns of B the new rows add nothing at first, but learn. Zeros in both would never learn:
    the gradient of each is a product with the other.
    """

    def compute(*span: Any) -> Tensor:  # all rows are made, so that every layout gets the same values
        """The rows or columns `span` of the matrix, fp32."""
        values = truncated_normal(*shape)(named_generator(0, name))
        if first is not None:
            values[: first.shape[0]] = first.read().float()
        return cut(values, *span)

    return ComputedTensor(shape, "float32", compute)


def padded_columns(inner: LazyTensor, columns: int, factor: float) -> LazyTensor:
    """A matrix times a factor (fp32), with zeros to its right up to `columns` columns."""

    def compute(dim: int | None, start: int, stop: int) -> Tensor:
        """Rows or columns start to stop of the padded matrix, fp32; dim None: all of it."""
        end, width = inner.shape[1], columns
        if dim == 1:
            width, start, stop = stop - start, min(start, end), min(stop, end)
        values = inner.read(dim, start, stop)
        return F.pad(values.float() * factor, (0, width - values.shape[1]))

    return ComputedTensor((inner.shape[0], columns), "float32", compute)


def some_columns(inner: LazyTensor, first: int, last: int) -> LazyTensor:
    """Columns [first, last) of a matrix."""

    def compute(dim: int | None, start: int, stop: int) -> Tensor:
        """Rows or columns start to stop of those columns, in `inner`'s dtype; dim None: all of them."""
        if dim == 0:
            return cut(inner.read(0, start, stop), 1, first, last)
        return inner.read(1, first + start, first + stop if dim else last)

    return ComputedTensor((inner.shape[0], last - first), inner.dtype, compute)


@dataclass(frozen=True)
class Factors:
    """y += scale * (x A^T) B^T."""

    a: LazyTensor
    b: LazyTensor
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    def rows(self, rows: Tensor) -> Factors:
        """The factors of some rows of the linear's weight (int64)."""
        return replace(self, b=self.b.select(rows))

    def block(self, i: int, count: int) -> Factors:
        """The i-th of `count` equal parts of the rank."""
        rank = self.rank // count
        first, last = i * rank, (i + 1) * rank
        return replace(self, a=self.a.select(torch.arange(first, last)), b=some_columns(self.b, first, last))

    def fitted(self, rank: int, scale: float, name: str) -> Factors:
        """The product of the linear `name` with another scale, which B makes up for, and at least the same rank."""
        factor = self.scale / scale if scale else 1.0
        a = random_rows(self.a, (rank, self.a.shape[1]), name) if self.rank < rank else self.a
        exact = self.rank == rank and factor == 1.0
        return Factors(a, self.b if exact else padded_columns(self.b, rank, factor), scale)


def new_factors(shape: tuple[int, int], rank: int, scale: float, name: str) -> Factors:
    """Factors that add nothing yet to the linear `name`, whose weight has `shape` [out, in]."""
    return Factors(random_rows(None, (rank, shape[1]), name), zeros(shape[0], rank), scale)
