"""Work divided over data-parallel ranks: each does its share, and all get all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as dist

from accessory.parallel.groups import data_parallel_group

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_ranks(items: Sequence[Item], work: Callable[[Item], Result]) -> list[Result]:
    """`work` of each item, in their order; every rank must call with the same items.

    All ranks work equally often, the last ones perhaps for nothing: where the model is sharded, they need each other.
    """
    group = data_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = [work(items[min(place, len(items) - 1)]) for place in range(rank, -(-len(items) // ranks) * ranks, ranks)]
    if ranks == 1:
        return mine
    parts: list[list[Result]] = [[] for _ in range(ranks)]
    dist.all_gather_object(parts, mine, group)
    return [parts[place % ranks][place // ranks] for place in range(len(items))]
