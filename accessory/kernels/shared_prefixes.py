"""Documents of a batch with a common beginning, which is packed, and computed, once.

A causal model computes the same for the same beginning, whatever follows. Everything but attention works token by token
and need not know; attention expands its inputs to whole documents, and packs its result again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
            repeated.append(Copies(rows.to(device), copies.to(device)))
        return SharedPrefixes(whole.to(device), places[begins].to(device), tuple(repeated))

    def lay_out(self, packed: Tensor) -> Tensor:
        """[T, ...] -> [W, ...]. In the backward, the gradients of a token's copies are summed."""
        return _LayOut.apply(packed, self)

    def pack(self, whole: Tensor) -> Tensor:
        """[W, ...] -> [T, ...], for values that are equal in all copies of a token."""
        return _Pack.apply(whole, self)

    def sum_copies(self, dwhole: Tensor) -> Tensor:
        """Gradients [W, ...] -> [T, ...]: those of a token's copies together."""
        dpacked = dwhole.index_select(0, self.first)
        for rows, copies in self.repeated:  # summed in one order, and in fp32 before it is rounded
            dpacked.index_copy_(0, rows, dwhole.index_select(0, copies).unflatten(0, (len(rows), -1)).sum(1))
        return dpacked


class _LayOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed: Tensor, prefixes: SharedPrefixes) -> Tensor:
        ctx.prefixes = prefixes
        return packed.index_select(0, prefixes.whole)

    @staticmethod
    def backward(ctx, dwhole: Tensor) -> tuple[Tensor, None]:
        return ctx.prefixes.sum_copies(dwhole), None


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole: Tensor, prefixes: SharedPrefixes) -> Tensor:
        ctx.prefixes = prefixes
        return whole.index_select(0, prefixes.first)

    @staticmethod
    def backward(ctx, dpacked: Tensor) -> tuple[Tensor, None]:
        dwhole = dpacked.new_zeros(len(ctx.prefixes.whole), *dpacked.shape[1:])
        return dwhole.index_copy_(0, ctx.prefixes.first, dpacked), None
