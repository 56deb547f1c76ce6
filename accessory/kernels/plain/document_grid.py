"""Packed documents in groups of about one length, padded to the group's longest, so that products are batched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_SCORES = 1 << 18  # attention scores, of all heads and documents, that are made at once
FEWEST_ROWS = 64  # of a block of scores, however long the document: below it the products get slow
MULTIPLE = 8  # of tokens, that a document is padded to: products of odd sizes are slow
_BLOCK_LENGTH = 32  # a document of so many tokens is one block, of four times as many two, and so on: measured
_CALL_SCORES = 1 << 17  # the cost of one more block of a group, in scores that could be made meanwhile


class Places(NamedTuple):
    """Indices between n heads of a packed tensor [T, n, E] and a group [count * K, n / K, longest, E].

    rows: int32 [count * n * longest], the row of [T * n, E] at each place; in a document's padding its last token's.
    padding: int64, the places that are padding.
    """

    rows: Tensor
    padding: Tensor


@dataclass(frozen=True)
class Group:
    """`count` documents, each padded to `longest` tokens, for `heads` query heads and `kv_heads` key/value heads.

    skipped: how many leading queries of every document need no result.
    """

    count: int
    longest: int
    skipped: int
    heads: int
    kv_heads: int
    places: dict[int, Places]
    """Of `heads` and of `kv_heads`."""

    def lay_out(self, packed: Tensor, pad_with_zeros: bool = False) -> Tensor:
        """[T, n, E] -> [count * K, n / K, longest, E]: heads that share keys and values are adjacent."""
        heads, width = packed.shape[1:]
        places = self.places[heads]
        laid_out = packed.reshape(-1, width).index_select(0, places.rows)
        if pad_with_zeros and len(places.padding):
            laid_out.index_fill_(0, places.padding, 0)
        return laid_out.view(self.count * self.kv_heads, -1, self.longest, width)


@dataclass(frozen=True)
class DocumentGrid:
    """All documents in groups."""

    groups: tuple[Group, ...]
    places: dict[int, Tensor]
    """Of `heads` and of `kv_heads`, n of them: int32 [T * n], where each row of [T, n, E] stands among those of all
    groups, one behind the other."""

    def empty(self, like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Memory for all groups of a tensor shaped as `like` [T, n, E]: all of it [rows, E], and each group's view."""
        heads, width = like.shape[1:]
        shapes = [(g.count * g.kv_heads, heads // g.kv_heads, g.longest, width) for g in self.groups]
        rows = [math.prod(shape[:3]) for shape in shapes]
        whole = like.new_empty(sum(rows), width)
        return whole, [part.view(shape) for part, shape in zip(whole.split(rows), shapes, strict=True)]

    def pack(self, whole: Tensor, heads: int) -> Tensor:
        """The memory of `empty`, filled -> [T, n, E]: the inverse of `lay_out`."""
        return whole.index_select(0, self.places[heads]).view(-1, heads, whole.shape[1])


@lru_cache(maxsize=2)
def grid_of(
    lengths: tuple[int, ...], heads: int, kv_heads: int, device: torch.device, skipped: tuple[int, ...] | None = None
) -> DocumentGrid:
    """For documents of `lengths` tokens, packed in that order, and attention by so many heads; made once a batch.

    skipped: how many leading queries of each document need no result.
    """
    skipped = skipped or (0,) * len(lengths)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = torch.tensor(lengths)
    starts = sizes.cumsum(0) - sizes
    groups = []
    back = {n: torch.empty(sum(lengths) * n, dtype=torch.int32) for n in (heads, kv_heads)}
    filled = dict.fromkeys(back, 0)
    for begin, end in cut_groups([lengths[i] for i in order], heads):
        members, longest = torch.tensor(order[begin:end]), padded(lengths[order[begin]])
        at = torch.arange(longest)
        tokens = starts[members, None] + torch.minimum(at, sizes[members, None] - 1)
        real = at < sizes[members, None]
        places = {}
        for n, whole in back.items():
            rows = (tokens[:, None] * n + torch.arange(n)[:, None]).flatten()
            mine = real[:, None].expand(-1, n, -1).flatten()
            whole[rows[mine]] = filled[n] + mine.nonzero()[:, 0].to(whole.dtype)
            filled[n] += len(rows)
            places[n] = Places(rows.to(whole.dtype).to(device), (~mine).nonzero()[:, 0].to(device))
        groups.append(Group(end - begin, longest, min(skipped[i] for i in order[begin:end]), heads, kv_heads, places))
    return DocumentGrid(tuple(groups), {n: whole.to(device) for n, whole in back.items()})


def rows_at_once(count: int, longest: int, heads: int, skipped: int = 0) -> int:
    """How many queries of each of `count` documents, the `skipped` first aside, attend at once: all, or a block."""
    most = max(BLOCK_SCORES // (count * heads * longest), FEWEST_ROWS)
    blocks = max(-(-longest // most), cheapest_blocks(longest))
    return max(-(-(longest - skipped) // blocks), 1)


def cheapest_blocks(length: int) -> int:
    """Into how many blocks of queries a document is cut: more blocks skip more keys that none of their queries sees."""
    return max(round(math.sqrt(length / _BLOCK_LENGTH)), 1)


def cut_groups(lengths: list[int], heads: int) -> list[tuple[int, int]]:
    """(begin, end) of the groups of descending `lengths` that together take the least time."""
    cost, begins = [0.0], [0]  # of the first documents; where the last group of those begins
    for end in range(1, len(lengths) + 1):
        found = []
        for begin in range(end - 1, -1, -1):
            blocks = cheapest_blocks(padded(lengths[begin]))
            scores = (end - begin) * heads * padded(lengths[begin]) ** 2 / blocks  # of the last block, the largest
            if found and scores > 2 * BLOCK_SCORES:  # one more block halves them at most: no later one fits
                break
            if found and scores > BLOCK_SCORES:
                continue
            found.append((cost[begin] + scores * (blocks + 1) / 2 + blocks * _CALL_SCORES, begin))
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
