"""A tensor of a checkpoint that is not read yet, and can be read slice by slice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class LazyTensor(ABC):
    """A named tensor in some file. `shape` is the whole tensor's."""

    shape: tuple[int, ...]

    @abstractmethod
    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """The tensor on the CPU, or its range [start, stop) along `dim`; memory is this result's, give or take."""


@dataclass(frozen=True)
class SafetensorsTensor(LazyTensor):
    """A tensor of a memory-mapped safetensors file."""

    file: Any  # safetensors.safe_open
    key: str
    shape: tuple[int, ...]

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Read the range by mmap."""
        if dim is None:
            return self.file.get_tensor(self.key)
        return self.file.get_slice(self.key)[(slice(None),) * dim + (slice(start, stop),)]


class ShardedTensor(LazyTensor):
    """A tensor that other software cut over several files along `shard_dim` (None: every file holds the whole)."""

    def __init__(self, shards: list[Tensor], shard_dim: int | None) -> None:
        self.shards = shards if shard_dim is not None else shards[:1]
        self.shard_dim = shard_dim
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
class GgufTensor(LazyTensor):
    """A block-quantized or plain tensor of a GGUF file, dequantized to fp32 when read."""

    tensor: Any  # gguf.ReaderTensor
    shape: tuple[int, ...]

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Dequantize the rows asked for; a range of columns needs the whole rows first."""
        import gguf

        rows = self.tensor.data[start:stop] if dim == 0 else self.tensor.data
        values = gguf.dequantize(rows, self.tensor.tensor_type)
        # Unquantized types come back as the read-only map of the file itself.
        values = torch.from_numpy(values if values.flags.writeable else values.copy())
        values = values.reshape(-1, *self.shape[1:])
        return values if dim in (None, 0) else values.narrow(dim, start, stop - start).contiguous()


@dataclass(frozen=True)
class InterleavedRows(LazyTensor):
    """Rows of a Hugging Face wq or wk, put back from channel halves to Meta's neighbouring pairs, head by head."""

    inner: LazyTensor
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Unchanged by the permutation."""
        return self.inner.shape

    def read(self, dim: int | None = None, start: int = 0, stop: int = 0) -> Tensor:
        """Read the range (whole heads, where it is a range of rows) and permute within each head."""
        values = self.inner.read(dim, start, stop)
        width = self.inner.shape[0] // self.heads
        return values.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
