"""The two factors of one linear's LoRA, unread: A [R, in], B [out, R], and the ways to make them fit another rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accessory.checkpoint.lazy import DerivedTensor, LazyTensor, ZeroTensor
from accessory.checkpoint.load import named_generator
from accessory.method.peft import truncated_normal


@dataclass(frozen=True)
class RandomRows(LazyTensor):
    """A's first rows from a file, if there are any, and below them random rows as a new LoRA has, seeded by `name`.

    With zeros in the same columns of B the new rows add nothing at first, but learn. Zeros in both would never learn:
    the gradient of each is a product with the other.
    """

    first: LazyTensor | None
    shape: tuple[int, int]
    name: str
    dtype: str = "float32"

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Make all rows, so that every layout gets the same values, and cut the range out of them."""
        values = truncated_normal(*self.shape)(named_generator(0, self.name))
        if self.first is not None:
            values[: self.first.shape[0]] = self.first.read().float()
        return values if dim is None else values.narrow(dim, start, stop - start).contiguous()


@dataclass(frozen=True)
class PaddedColumns(DerivedTensor):
    """A matrix times a factor, with columns of zeros to its right."""

    columns: int
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """With `columns` columns."""
        return (self.inner.shape[0], self.columns)

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Read the part of the inner matrix that lies in the range; fp32."""
        if dim == 1:
            end = self.inner.shape[1]
            values, columns = self.inner.read(1, min(start, end), min(stop, end)), stop - start
        else:
            values, columns = self.inner.read(dim, start, stop), self.columns
        padded = torch.zeros(len(values), columns)
        padded[:, : values.shape[1]] = values.float() * self.factor
        return padded


@dataclass(frozen=True)
class SomeColumns(DerivedTensor):
    """Columns [first, last) of a matrix."""

    first: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        """With `last - first` columns."""
        return (self.inner.shape[0], self.last - self.first)

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Read no other columns, or no other rows."""
        if dim == 0:
            return self.inner.read(0, start, stop)[:, self.first : self.last].contiguous()
        first, last = (0, self.last - self.first) if dim is None else (start, stop)
        return self.inner.read(1, self.first + first, self.first + last)


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
        return replace(self, a=self.a.select(torch.arange(first, last)), b=SomeColumns(self.b, first, last))

    def fitted(self, rank: int, scale: float, name: str) -> Factors:
        """The product of the linear `name` with another scale, which B makes up for, and at least the same rank."""
        factor = self.scale / scale if scale else 1.0
        a = RandomRows(self.a, (rank, self.a.shape[1]), name) if self.rank < rank else self.a
        exact = self.rank == rank and factor == 1.0
        return Factors(a, self.b if exact else PaddedColumns(self.b, rank, factor), scale)


def new_factors(shape: tuple[int, int], rank: int, scale: float, name: str) -> Factors:
    """Factors that add nothing yet to the linear `name`, whose weight has `shape` [out, in]."""
    return Factors(RandomRows(None, (rank, shape[1]), name), ZeroTensor((shape[0], rank)), scale)
