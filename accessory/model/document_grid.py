"""Packed documents laid out for products of one size: those of about one length side by side, padded to the longest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 19  # attention scores, of all heads and documents, that are made at once
FEWEST_ROWS = 64  # of a block of scores, however long the document: below it the products get slow
MULTIPLE = 8  # of tokens, that a document is padded to: products of odd sizes are slow
_CALL_SCORES = 1 << 17  # scores that could be made while one more group is begun


@dataclass(frozen=True)
class Group:
    """`count` documents, each padded to `longest` tokens: a grid of count * longest cells.

    tokens: int64 [cells], the rows of the packed tensors that stand there; padding: int64, the cells where what stands
    there belongs to nobody.
    """

    count: int
    longest: int
    tokens: Tensor
    padding: Tensor

    def lay_out(self, packed: Tensor, kv_heads: int, pad_with_zeros: bool = False) -> Tensor:
        """[T, H, E] -> [count * K, H / K, longest, E]: heads that share keys and values stand together."""
        cells = packed.index_select(0, self.tokens)
        if pad_with_zeros and len(self.padding):
            cells.index_fill_(0, self.padding, 0)
        cells = cells.view(self.count, self.longest, kv_heads, -1, packed.shape[2])
        return cells.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()

    def rows(self, heads: int) -> int:
        """How many queries of each document attend at once."""
        return rows_at_once(self.count, self.longest, heads)


@dataclass(frozen=True)
class DocumentGrid:
    """All documents in groups. cells: int64 [T], each token's among those of all groups, one behind the other."""

    groups: tuple[Group, ...]
    cells: Tensor

    def pack(self, laid_out: Sequence[Tensor]) -> Tensor:
        """[count * K, H / K, longest, E] of every group -> [T, H, E]: the way back."""
        parts = [
            part.unflatten(0, (group.count, -1)).permute(0, 3, 1, 2, 4).reshape(len(group.tokens), -1, part.shape[-1])
            for group, part in zip(self.groups, laid_out, strict=True)
        ]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).index_select(0, self.cells)


@lru_cache(maxsize=2)
def grid_of(lengths: tuple[int, ...], heads: int, device: torch.device) -> DocumentGrid:
    """For documents of `lengths` tokens, packed in that order, and attention by `heads` heads; made once a batch."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    groups, cells, filled = [], torch.empty(sum(lengths), dtype=torch.int64), 0
    for begin, end in cut_groups([lengths[i] for i in order], heads):
        members = torch.tensor(order[begin:end])
        longest = padded(lengths[order[begin]])
        at = torch.arange(longest)
        tokens = starts[members, None] + torch.minimum(at, sizes[members, None] - 1)
        real = (at < sizes[members, None]).flatten()
        cells[tokens.flatten()[real]] = filled + real.nonzero()[:, 0]
        padding = (~real).nonzero()[:, 0].to(device)
        groups.append(Group(len(members), longest, tokens.flatten().to(device), padding))
        filled += real.numel()
    return DocumentGrid(tuple(groups), cells.to(device))


def rows_at_once(count: int, longest: int, heads: int) -> int:
    """How many queries of each of `count` documents attend at once: all, or blocks of one size."""
    most = max(BLOCK_SCORES // (count * heads * longest), FEWEST_ROWS)
    return -(-longest // -(-longest // most))


def cut_groups(lengths: list[int], heads: int) -> list[tuple[int, int]]:
    """Of falling `lengths`: where the groups begin and end that together take the least time."""
    cost, begins = [0], [0]  # of the first documents; where the last group of those begins
    for end in range(1, len(lengths) + 1):
        found = []
        for begin in range(end - 1, -1, -1):
            scores = (end - begin) * heads * padded(lengths[begin]) ** 2
            if found and scores > BLOCK_SCORES:
                break
            found.append((cost[begin] + scores + _CALL_SCORES, begin))
        least, begin = min(found)
        cost.append(least)
        begins.append(begin)
    cuts, end = [], len(lengths)
    while end:
        cuts.append((begins[end], end))
        end = begins[end]
    return cuts[::-1]


def padded(length: int) -> int:
    """Tokens that a document of `length` takes in a grid at least."""
    return -(-length // MULTIPLE) * MULTIPLE
