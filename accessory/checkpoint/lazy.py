"""A tensor of a checkpoint that is not read yet, and can be read slice by slice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.errors import CheckpointError
from accessory.quant.packed import PackedState, PackedWeight


class LazyTensor(ABC):
    """A named tensor in some file. `shape` is the whole tensor's, `dtype` its type as the file spells it (F32, ...)."""

    shape: tuple[int, ...]
    dtype: str

    @abstractmethod
    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The tensor on the CPU, or its range [start, stop) along `dim`; takes little more memory than the result."""

    def select(self, rows: Tensor) -> LazyTensor:
        """The tensor whose i-th row is this one's row `rows[i]` (int64)."""
        return SelectedRows(self, rows)

    def transposed(self) -> LazyTensor:
        """The transpose of a matrix."""
        return ComputedTensor(self.shape[::-1], self.dtype, self._read_transposed)

    def _read_transposed(self, dim: int | None, start: int, stop: int) -> Tensor:
        return self.read(None if dim is None else 1 - dim, start, stop).t().contiguous()


class HeldTensor(LazyTensor):
    """A tensor `value` that is in memory, or mapped there."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.shape, self.dtype = value, tuple(value.shape), str(value.dtype).removeprefix("torch.")

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The value or a copy of the range."""
        return cut(self.value, dim, start, stop)


class ShardedTensor(LazyTensor):
    """A tensor that other software cut over several files along `shard_dim` (None: every file holds the whole)."""

    def __init__(self, shards: list[Tensor], shard_dim: int | None) -> None:
        self.shards = shards if shard_dim is not None else shards[:1]
        self.shard_dim = shard_dim
        self.dtype = str(shards[0].dtype).removeprefix("torch.")
        shape = list(shards[0].shape)
        if shard_dim is not None:
            shape[shard_dim] = sum(shard.shape[shard_dim] for shard in shards)
        self.shape = tuple(shape)

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Take the range out of each memory-mapped shard, then join."""
        if dim is None:
            return self._join(self.shards)
        if dim != self.shard_dim:
            return self._join([shard.narrow(dim, start, stop - start) for shard in self.shards])
        parts, begin = [], 0
        for shard in self.shards:
            size = shard.shape[dim]
            low, high = max(start - begin, 0), min(stop - begin, size)
            if low < high:
                parts.append(shard.narrow(dim, low, high - low))
            begin += size
        return self._join(parts)

    def _join(self, parts: list[Tensor]) -> Tensor:
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, self.shard_dim)


@dataclass(frozen=True)
class ComputedTensor(LazyTensor):
    """A tensor that is computed, from others as a rule: `compute` takes the arguments of `read`, all of them."""

    shape: tuple[int, ...]
    dtype: str
    compute: Callable[[int | None, int, int], Tensor]

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Compute the range."""
        return self.compute(dim, start, stop)


class UnpackedTensor(ComputedTensor):
    """A matrix [N, K] that its file holds packed, in a way that no storage here has: it is read as plain weights."""

    def select(self, rows: Tensor) -> LazyTensor:
        """Some of its rows are unpacked weights, too."""
        return UnpackedTensor((len(rows), self.shape[1]), self.dtype, SelectedRows(self, rows).read)


class SelectedRows(LazyTensor):
    """Some rows (int64) of another tensor, in any order."""

    def __init__(self, inner: LazyTensor, rows: Tensor) -> None:
        self.inner, self.rows = inner, rows
        self.shape, self.dtype = (len(rows), *inner.shape[1:]), inner.dtype

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Read no rows above the first or below the last that is wanted."""
        rows = self.rows[start:stop] if dim == 0 else self.rows
        first, last = int(rows.min()), int(rows.max())
        if dim in (None, 0):
            values = self.inner.read(0, first, last + 1)
            return values if bool((rows.diff() == 1).all()) else values[rows - first]
        return self.inner.read(dim, start, stop)[rows]

    def select(self, rows: Tensor) -> LazyTensor:
        """Selecting twice is selecting once."""
        return SelectedRows(self.inner, self.rows[rows])


class StackedRows(LazyTensor):
    """Several tensors put into one, the i-th row of `parts[j]` at row `rows[j][i]`; of the first part's dtype."""

    def __init__(self, parts: tuple[LazyTensor, ...], rows: tuple[Tensor, ...]) -> None:
        self.parts, self.rows = parts, rows
        self.shape, self.dtype = (sum(map(len, rows)), *parts[0].shape[1:]), parts[0].dtype

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Put the whole together; a range is cut out of it."""
        first = self.parts[0].read()
        whole = first.new_empty(self.shape)
        whole[self.rows[0]] = first
        for part, rows in zip(self.parts[1:], self.rows[1:], strict=True):
            whole[rows] = part.read().to(whole.dtype)
        return cut(whole, dim, start, stop)


@dataclass(frozen=True)
class PackedTensor(LazyTensor):
    """A matrix [N, K] that its file holds packed, as its storage's `parts`.

    `read` dequantizes to fp32, `read_packed` gives the parts as they are. rows: the rows of the file that the matrix
    consists of, in order; None: all. trained: parts that another file holds, of these rows.
    """

    parts: dict[str, LazyTensor]
    storage: type[PackedWeight]
    shape: tuple[int, int]
    name: str
    rows: Tensor | None = None
    trained: dict[str, LazyTensor] = field(default_factory=dict)
    dtype: str = "float32"

    @staticmethod
    def of(
        parts: dict[str, LazyTensor], storage: type[PackedWeight], shape: tuple[int, int], name: str
    ) -> PackedTensor:
        """The whole matrix called `name`. Raises `CheckpointError` for parts whose sizes or types do not make it."""
        return PackedTensor(parts, storage.stored_as(parts, shape, name), shape, name)

    def stored(self) -> PackedState:
        """The parts of the matrix in the file, all rows. Raises `CheckpointError` where one is infinite or NaN."""
        found = {part: tensor.read() for part, tensor in self.parts.items()}
        return {part: finite(value, f"{self.name}: its {part}") for part, value in found.items()}

    def read_packed(self, dim: int | None = None, start: int = 0, stop: int = 0) -> PackedState:
        """The parts of the matrix or of a range of it; codes are the file's, unchanged."""
        cut, span, where = self.storage.cut, (dim, start, stop), (self.shape[1], self.name)
        if not self.trained:
            return cut(self.stored(), *where, self.rows, span)
        trained = {part: tensor.read() for part, tensor in self.trained.items()}
        return cut(cut(self.stored(), *where, self.rows) | trained, *where, span=span)

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Dequantize to fp32."""
        return self.read_matrix(dim, start, stop).unpack(torch.float32)

    def read_matrix(self, dim: int | None = None, start: int = 0, stop: int = 0) -> PackedWeight:
        """The matrix or a range of it, packed."""
        shape = list(self.shape)
        if dim is not None:
            shape[dim] = stop - start
        matrix = self.storage.of_range(self.shape[1], (dim, start, stop))(tuple(shape))
        matrix.adopt(self.read_packed(dim, start, stop))
        return matrix

    def select(self, rows: Tensor) -> LazyTensor:
        """The same matrix, with some of its rows."""
        chosen = rows if self.rows is None else self.rows[rows]
        return replace(self, rows=chosen, shape=(len(rows), self.shape[1]))


def finite(values: Tensor, name: str) -> Tensor:
    """The values themselves. Raises `CheckpointError`, by their `name`, where one is infinite or NaN."""
    if values.is_floating_point() and not (usable := values.isfinite()).all():
        found = values[~usable]
        raise CheckpointError(
            f"{name} holds {float(found[0])} in {len(found)} of {values.numel()} places; expected finite numbers. The "
            "file is damaged, or what wrote it went wrong: take another copy."
        )
    return values


def cut(whole: Tensor, dim: int | None, start: int, stop: int) -> Tensor:
    """A copy of the range [start, stop) along `dim` of a tensor; without `dim` the tensor itself."""
    return whole if dim is None else whole.narrow(dim, start, stop - start).contiguous()


def zeros(*shape: int) -> LazyTensor:
    """Zeros (fp32), where a file leaves out what changes nothing."""
    return ComputedTensor(shape, "float32", lambda *span: cut(torch.zeros(shape), *span))


def summed(first: LazyTensor, second: LazyTensor) -> LazyTensor:
    """A tensor and the difference that another file adds to it, summed in fp32."""
    return ComputedTensor(
        first.shape, first.dtype, lambda *span: first.read(*span).float() + second.read(*span).float()
    )


def grown_rows(inner: LazyTensor, count: int) -> LazyTensor:
    """An embedding [`count`, D], whose rows for tokens added to its vocabulary start as the mean of the others."""

    def compute(*span: Any) -> Tensor:
        """The rows or columns `span` of the grown embedding."""
        values = inner.read()
        mean = values.float().mean(0, keepdim=True).to(values.dtype)
        return cut(torch.cat([values, mean.expand(count - len(values), -1)]), *span)

    return ComputedTensor((count, *inner.shape[1:]), inner.dtype, compute)


def first_rows(inner: LazyTensor, count: int) -> LazyTensor:
    """The first `count` rows of a matrix."""

    def compute(dim: int | None, start: int, stop: int) -> Tensor:
        """Rows or columns start to stop; dim None: all of it."""
        return inner.read(0, start, stop) if dim == 0 else cut(inner.read(0, 0, count), dim, start, stop)

    return ComputedTensor((count, *inner.shape[1:]), inner.dtype, compute)


def unit_rows(inner: LazyTensor) -> LazyTensor:
    """A matrix whose rows are scaled to length 1 (fp32), as a normalized head has them; rows of zeros stay."""

    def compute(dim: int | None, start: int, stop: int) -> Tensor:
        """Rows or columns start to stop, fp32; dim None: all of it."""
        if dim == 0:
            return F.normalize(inner.read(0, start, stop).float())
        return cut(F.normalize(inner.read().float()), dim, start, stop)  # a row's length depends on all of it

    return ComputedTensor(inner.shape, "float32", compute)
