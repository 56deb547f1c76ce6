"""The two factors of one linear's LoRA, unread: A [R, in], B [out, R], and the ways to make them fit another rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from accessory.checkpoint.lazy import LazyTensor, ZeroTensor


@dataclass(frozen=True)
class PaddedTensor(LazyTensor):
    """A matrix times a factor, in the corner of a larger one of zeros."""

    inner: LazyTensor
    shape: tuple[int, int]
    factor: float = 1.0

    @property
    def dtype(self) -> str:
        """The inner matrix's."""
        return self.inner.dtype

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Read what of the inner matrix lies in the range, in fp32."""
        shape = list(self.shape)
        if dim is None:
            values = self.inner.read()
        else:
            shape[dim] = stop - start
            end = self.inner.shape[dim]
            values = self.inner.read(dim, min(start, end), min(stop, end))
        padded = torch.zeros(shape)
        padded[: values.shape[0], : values.shape[1]] = values.float() * self.factor
        return padded


@dataclass(frozen=True)
class SomeColumns(LazyTensor):
    """Columns [first, last) of a matrix."""

    inner: LazyTensor
    first: int
    last: int

    @property
    def shape(self) -> tuple[int, int]:
        """As many columns as there are in the range."""
        return (self.inner.shape[0], self.last - self.first)

    @property
    def dtype(self) -> str:
        """The whole matrix's."""
        return self.inner.dtype

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

    def fitted(self, rank: int, scale: float) -> Factors:
        """The same product at another scale, which B makes up for, and at a rank no smaller."""
        factor = self.scale / scale if scale else 1.0
        a = PaddedTensor(self.a, (rank, self.a.shape[1])) if self.rank < rank else self.a
        exact = self.rank == rank and factor == 1.0
        b = self.b if exact else PaddedTensor(self.b, (self.b.shape[0], rank), factor)
        return Factors(a, b, scale)


def no_factors(shape: tuple[int, int], rank: int, scale: float) -> Factors:
    """Factors that add nothing to a linear whose weight has `shape` [out, in]."""
    return Factors(ZeroTensor((rank, shape[1])), ZeroTensor((shape[0], rank)), scale)
