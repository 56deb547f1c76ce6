"""Documents packed in one tensor, as attention kernels take them, with a common beginning packed, and computed, once.

A causal model computes the same for the same beginning, whatever follows. Everything but attention works token by token
and need not know; attention expands its inputs to whole documents, and packs its result again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.kernels.sending import send


class Copies(NamedTuple):
    """Packed tokens that are each in G documents: rows int64 [n], and copies int64 [n * G], their places there."""

    rows: Tensor
    copies: Tensor


class SharedPrefixes(NamedTuple):
    """Places of T packed tokens in the whole documents, one after the other, of W tokens together.

    whole: int64 [W], the packed token at each place. first: int64 [T], the first place of each packed token.
    repeated: the tokens with several places, grouped by their number.
    """

    whole: Tensor
    first: Tensor
    repeated: tuple[Copies, ...]

    @staticmethod
    def build(lengths: tuple[int, ...], shared: tuple[int, ...], device: torch.device) -> SharedPrefixes | None:
        """Of documents of `lengths` tokens, the first `shared` of each being those of the one before it, or None."""
        if not any(shared):
            return None
        documents, packed = [torch.empty(0, dtype=torch.int64)], 0
        for length, known in zip(lengths, shared, strict=True):
            new = torch.arange(packed, packed + length - known)
            documents.append(torch.cat([documents[-1][:known], new]))
            packed += len(new)
        whole = torch.cat(documents)
        counts, places = whole.bincount(minlength=packed), whole.argsort(stable=True)
        begins = counts.cumsum(0) - counts
        repeated = []
        for count in counts[counts > 1].unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            copies = places[(begins[rows, None] + torch.arange(count)).flatten()]
            repeated.append(Copies(send(rows, device), send(copies, device)))
        return SharedPrefixes(send(whole, device), send(places[begins], device), tuple(repeated))

    def lay_out(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [W, ...]. In the backward, the gradients of a token's copies are summed."""
        return _Select.apply(packed, self.whole, self.sum_copies)

    def pack(self, whole: Tensor) -> Tensor:
        """[W, ...] -> [T, ...], for values that are equal in all copies of a token."""
        return _Select.apply(whole, self.first, self._among_zeros)

    def sum_copies(self, dwhole: Tensor) -> Tensor:
        """Gradients [W, ...] -> [T, ...]: those of a token's copies together."""
        dpacked = dwhole.index_select(0, self.first)
        for rows, copies in self.repeated:  # summed in one order, and in fp32 before it is rounded
            dpacked.index_copy_(0, rows, dwhole.index_select(0, copies).unflatten(0, (len(rows), -1)).sum(1))
        return dpacked

    def _among_zeros(self, dpacked: Tensor) -> Tensor:
        dwhole = dpacked.new_zeros(len(self.whole), *dpacked.shape[1:])
        return dwhole.index_copy_(0, self.first, dpacked)


class _Select(torch.autograd.Function):
    """Rows of x; `back` makes x's gradient of the result's."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
        """x [N, ...], rows int64 [M] -> [M, ...]."""
        ctx.back = back
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """dy [M, ...] -> x's gradient [N, ...]."""
        return ctx.back(dy), None, None


@dataclass(frozen=True)
class Documents:
    """Documents of `lengths` tokens, the first `shared` of which are packed in the document before it only.

    prefixes: where shared tokens are, or None.
    """

    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    device: torch.device
    prefixes: SharedPrefixes | None

    @staticmethod
    def build(
        lengths: tuple[int, ...], shared: tuple[int, ...] | None = None, device: torch.device | None = None
    ) -> Documents:
        """Of tensors on `device`, the CPU when absent; nothing is shared where `shared` is absent."""
        shared, device = shared or (0,) * len(lengths), device or torch.device("cpu")
        return Documents(lengths, shared, device, SharedPrefixes.build(lengths, shared, device))

    @property
    def keys(self) -> int:
        """Tokens of all documents, those that are shared counted in each."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Tokens that are packed."""
        return sum(self.lengths) - sum(self.shared)

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths, default=0)

    @cached_property
    def offsets(self) -> Tensor:
        """Where each document begins and the last one ends, int32 [B + 1], for variable-length attention kernels."""
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return send(ends, self.device)

    @cached_property
    def table(self) -> Tensor:
        """A row for each document, the longest first, for the C++ kernel on the CPU, int64 [B, 4].

        Its first key, its tokens, how many of them are shared (their results are not needed), and the row of its first
        query, as if that were packed.
        """
        place = row = 0
        entries = []
        for length, known in zip(self.lengths, self.shared, strict=True):
            entries.append((place, length, known, row - known))
            place += length
            row += length - known
        entries.sort(key=lambda entry: -entry[1])
        return torch.tensor(entries, dtype=torch.int64, device="cpu").view(-1, 4)
