"""Tensor parallelism: how one matrix, bias or embedding is cut over the ranks of a model-parallel group.

A column-parallel matrix [N, K] is cut along N: every rank sees the whole input and makes its slice of the output. A
row-parallel one is cut along K: every rank sees its slice of the input, and the partial outputs are summed.
(Megatron-LM, Shoeybi et al. 2019, section 3; the communication is fairscale's.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import Tensor, nn

from accessory.parallel.groups import model_parallel_group


@dataclass(frozen=True)
class Slicing:
    """How a parameter relates to the whole one.

    dim: the dimension along which ranks hold slices, or None where every rank holds the whole.
    partial: every rank holds the whole, but its gradient is only this rank's share and must be summed over the group.
    """

    dim: int | None = None
    partial: bool = False


WHOLE = Slicing()


def mark(parameter: nn.Parameter, slicing: Slicing) -> nn.Parameter:
    """Write on a parameter how it is sliced; returns it."""
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


def gather_slices(tensor: Tensor, dim: int | None) -> Tensor:
    """The whole tensor from every rank's slice along `dim` (itself where `dim` is None). A collective; no gradient."""
    group = model_parallel_group()
    if dim is None or dist.get_world_size(group) == 1:
        return tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim)


__all__ = [
    "WHOLE",
    "Slicing",
    "copy_to_model_parallel_region",
    "gather_from_model_parallel_region",
    "gather_slices",
    "mark",
    "reduce_from_model_parallel_region",
    "slice_bounds",
    "slicing_of",
]
