"""Where each token of a packed micro-batch stands: document lengths, positions, rotations. Made once a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from accessory.kernels.documents import Documents
from accessory.model.position import rotations


@dataclass(frozen=True)
class Sequences:
    """B documents laid end to end in T tokens. Attention never crosses from one to the next.

    lengths: new tokens of each document, summing to T where none are shared. starts: tokens of each document already in
    the key/value cache (all zero in training). positions: of each token in its document [T], on the tokens' device.
    turn: rotary factors [T, 1, rotary_dim / 2]. documents: the same for attention kernels, and what documents share.
    lean: ALiBi's channels (`lean_channels`), or None.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    positions: Tensor
    turn: Tensor
    documents: Documents
    lean: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def build(
        lengths: tuple[int, ...],
        frequencies: Tensor,
        starts: tuple[int, ...] | None = None,
        shared: tuple[int, ...] | None = None,
    ) -> Sequences:
        """Positions run from `starts` in each document; `frequencies` [rotary_dim / 2] lies on the tokens' device.

        shared: how many tokens each document begins with that are those of the one before it, and packed only there;
        not with a cache.
        """
        starts, shared = starts or (0,) * len(lengths), shared or (0,) * len(lengths)
        if any(starts) and any(shared):
            raise AssertionError(f"documents of {starts} cached tokens cannot share beginnings ({shared})")
        spans = zip(starts, shared, lengths, strict=True)
        positions = torch.cat([torch.arange(start + known, start + n) for start, known, n in spans])
        positions = positions.to(frequencies.device)
        documents = Documents.build(lengths, shared, positions.device)
        return Sequences(lengths, starts, positions, rotations(frequencies, positions), documents)

    def leaning(self, channels: tuple[Tensor, Tensor]) -> Sequences:
        """The same with ALiBi's channels."""
        return replace(self, lean=channels)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens that the cache has of each document with the new ones."""
        return tuple(start + length for start, length in zip(self.starts, self.lengths, strict=True))
