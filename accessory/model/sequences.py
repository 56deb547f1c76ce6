"""Document lengths, positions and rotations of the tokens of a packed micro-batch. Made once a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from accessory.kernels.documents import Documents
from accessory.model.position import rotations_at


@dataclass(frozen=True)
class Sequences:
    """B documents, one after the other in T tokens. Attention stays inside each.

    lengths: new tokens of each document, summing to T where none are shared. starts: tokens of each document already in
    the key/value cache (all zero in training). positions: of each token in its document [T], on the tokens' device.
    rotations: as `rotations_at`. documents: lengths and shared beginnings, for attention kernels. alibi: as
    `alibi_channels`, or None. labelled: tokens that have a label, int64 [L], where that is known and there are any.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    positions: Tensor
    rotations: Tensor
    documents: Documents
    alibi: tuple[Tensor, Tensor] | None = None
    labelled: Tensor | None = None

    @staticmethod
    def build(
        lengths: tuple[int, ...],
        frequencies: Tensor,
        starts: tuple[int, ...] | None = None,
        shared: tuple[int, ...] | None = None,
    ) -> Sequences:
        """Positions run from `starts` in each document; `frequencies` [rotary_dim / 2] lies on the tokens' device.

        shared: how many leading tokens each document has in common with the one before it, where alone they are
        packed; not with a cache.
        """
        starts, shared = starts or (0,) * len(lengths), shared or (0,) * len(lengths)
        if any(starts) and any(shared):
            raise AssertionError(f"documents of {starts} cached tokens cannot share beginnings ({shared})")
        spans = zip(starts, shared, lengths, strict=True)
        positions = torch.cat([torch.arange(start + known, start + n) for start, known, n in spans])
        positions = positions.to(frequencies.device)
        documents = Documents.build(lengths, shared, positions.device)
        return Sequences(lengths, starts, positions, rotations_at(frequencies, positions), documents)

    def with_labels(self, labels: Tensor) -> Sequences:
        """The same with `labels` [T], negative where there is none."""
        rows = (labels >= 0).nonzero()[:, 0]
        return replace(self, labelled=rows if len(rows) else None)

    def with_alibi(self, channels: tuple[Tensor, Tensor]) -> Sequences:
        """The same with ALiBi's channels."""
        return replace(self, alibi=channels)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens of each document in the cache, with the new ones."""
        return tuple(start + length for start, length in zip(self.starts, self.lengths, strict=True))
