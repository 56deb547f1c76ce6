"""Tensor parallelism: how one matrix, bias or embedding is cut over the ranks of a model-parallel group.

A column-parallel matrix [N, K] is cut along N: every rank sees the whole input and makes its slice of the output. A
row-parallel one is cut along K: every rank sees its slice of the input, and the partial outputs are summed.
(Megatron-LM, Shoeybi et al. 2019, section 3; the communication is fairscale's.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import mappings
from torch import Tensor, nn

from accessory.parallel.groups import model_parallel_group


@dataclass(frozen=True)
class Slicing:
    """How a parameter relates to the whole one.

    dim: the dimension along which ranks hold slices, or None where every rank holds the whole.
    partial: every rank holds the whole, but its gradient is only this rank's share and must be summed over the group.
    whole: size of the whole along `dim` where the ranks need not divide it; the last slices are padded with zeros.
    """

    dim: int | None = None
    partial: bool = False
    whole: int | None = None

    def whole_shape(self, local: tuple[int, ...], ranks: int) -> tuple[int, ...]:
        """Shape of the whole parameter, from that of a rank's slice."""
        if self.dim is None:
            return local
        size = local[self.dim] * ranks if self.whole is None else self.whole
        return (*local[: self.dim], size, *local[self.dim + 1 :])


WHOLE = Slicing()


def mark(parameter: nn.Parameter, slicing: Slicing) -> nn.Parameter:
    """Record on a parameter how it is sliced; returns it."""
    parameter.slicing = slicing
    return parameter


def slicing_of(parameter: nn.Parameter) -> Slicing:
    """How a parameter is sliced; unmarked ones are whole."""
    return getattr(parameter, "slicing", WHOLE)


def slice_bounds(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """The half-open range of `rank` when `size` is cut evenly over `ranks`."""
    if size % ranks:
        raise AssertionError(f"{size} cannot be cut into {ranks} equal slices; the sizes are checked before")
    step = size // ranks
    return rank * step, (rank + 1) * step


def padded_bounds(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """The half-open range of `rank` when `size` is cut into equal slices, the last of which may be shorter or empty."""
    step = -(-size // ranks)
    return min(rank * step, size), min((rank + 1) * step, size)


def pad_slice(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The tensor padded with zeros to `size` along `dim`; itself if it has that size."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :])], dim)


def own_slice(tensor: Tensor, slicing: Slicing, rank: int, ranks: int) -> Tensor:
    """What `rank` holds of a whole tensor; itself where nothing is cut."""
    if slicing.dim is None:
        return tensor
    size = tensor.shape[slicing.dim]
    start, stop = slice_bounds(size, rank, ranks) if slicing.whole is None else padded_bounds(size, rank, ranks)
    return pad_slice(tensor.narrow(slicing.dim, start, stop - start), slicing.dim, -(-size // ranks))


_SILENT = ContextVar("silent", default=False)


@contextmanager
def without_communication() -> Iterator[None]:
    """Inside this context a forward has the shapes of one rank of many, but does not communicate: for measurements."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


def copy_to_model_parallel_region(x: Tensor) -> Tensor:
    """x, equal on all ranks; its gradient is summed over the ranks."""
    return x if _SILENT.get() else mappings.copy_to_model_parallel_region(x)


def reduce_from_model_parallel_region(x: Tensor) -> Tensor:
    """The sum of x over the ranks; every rank's gradient is the sum's."""
    return x if _SILENT.get() else mappings.reduce_from_model_parallel_region(x)


gather_from_model_parallel_region = mappings.gather_from_model_parallel_region


def reduce_over_model_parallel(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce a small tensor over the model-parallel ranks, in place. One rank alone starts no NCCL."""
    group = model_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, operation, group)
    return tensor


def gather_slices(tensor: Tensor, dim: int | None) -> Tensor:
    """The whole tensor from every rank's slice along `dim` (itself where `dim` is None). A collective; no gradient."""
    group = model_parallel_group()
    if dim is None or dist.get_world_size(group) == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim)
