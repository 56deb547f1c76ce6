"""Document lengths, positions and rotations of the tokens of a packed micro-batch. Made once a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from accessory.kernels.documents import Documents
from accessory.kernels.sending import send
from accessory.model.position import rotations_at


@dataclass(frozen=True)
class Sequences:
    """B documents, one after the other in T tokens. Attention stays inside each.

    lengths: new tokens of each document, summing to T where none are shared. starts: tokens of each document already in
    the key/value cache (all zero in training). positions: of each token in its document [T], on the tokens' device.
    rotations: as `rotations_at`. documents: lengths and shared beginnings, for attention kernels. alibi: as
    `alibi_channels`, or None. labelled: tokens that have a label, int64 [L], where that is known and there are any.
    pictures: (tokens, what is added to the prefix that they attend to, [P, D], or None) of runs of tokens, in order,
    where pictures enter so and a document has one. prefixes: (rows [n, P, D], gates fp32 [H]) of each block that has
    prefixes, for its addition to attention; n: as many as `pictures`, or one.
    """

    lengths: tuple[int, ...]
    starts: tuple[int, ...]
    positions: Tensor
    rotations: Tensor
    documents: Documents
    alibi: tuple[Tensor, Tensor] | None = None
    labelled: Tensor | None = None
    pictures: tuple[tuple[int, Tensor | None], ...] = ()
    prefixes: tuple[tuple[Tensor, Tensor], ...] = ()

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
        positions = send(positions, frequencies.device)
        documents = Documents.build(lengths, shared, positions.device)
        return Sequences(lengths, starts, positions, rotations_at(frequencies, positions), documents)

    def with_labels(self, labels: Tensor) -> Sequences:
        """The same with `labels` [T], negative where there is none."""
        return self.with_labelled((labels >= 0).nonzero()[:, 0])

    def with_labelled(self, rows: Tensor) -> Sequences:
        """The same where the tokens `rows`, int64 [L], have labels."""
        return replace(self, labelled=rows if len(rows) else None)

    def with_alibi(self, channels: tuple[Tensor, Tensor]) -> Sequences:
        """The same with ALiBi's channels."""
        return replace(self, alibi=channels)

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Tokens of each document in the cache, with the new ones."""
        return tuple(start + length for start, length in zip(self.starts, self.lengths, strict=True))

    @property
    def continued(self) -> bool:
        """Whether a document has tokens in the cache already."""
        return any(self.starts)

    def put(self, cached: Tensor, new: Tensor) -> None:
        """Write the new tokens' keys or values [T, ...] to `cached` [B, longest, ...], behind what documents have."""
        begin = 0
        for i, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            cached[i, start : start + length] = new[begin : begin + length]
            begin += length


@dataclass(frozen=True)
class NextTokens(Sequences):
    """One new token of each of B documents. Only the device knows how many tokens they have: `positions` [B].

    So every token of an answer takes the same work in the same shapes, which can be recorded and replayed.
    span: how many tokens of the cache attention looks at; all positions are below it.
    """

    span: int = 0

    @staticmethod
    def at(positions: Tensor, frequencies: Tensor, span: int) -> NextTokens:
        """The tokens at `positions` int64 [B]; frequencies as in `Sequences.build`."""
        ones = (1,) * len(positions)
        rotations, documents = rotations_at(frequencies, positions), Documents.build(ones, None, positions.device)
        return NextTokens(ones, (0,) * len(ones), positions, rotations, documents, span=span)

    @property
    def continued(self) -> bool:
        """Always true: all that a document has is read from the cache."""
        return True

    def put(self, cached: Tensor, new: Tensor) -> None:
        """See `Sequences`."""
        cached.index_put_((self._rows, self.positions), new)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Added to the scores of the cache's first tokens [B, span]: 0 for those that the new token sees, else -inf.

        window: how many tokens, up to its own, it sees; all if absent.
        """
        if window not in self._masks:
            tokens = torch.arange(self.span, device=self.positions.device)
            hidden = tokens > self.positions[:, None]
            if window is not None:
                hidden |= tokens <= self.positions[:, None] - window
            self._masks[window] = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
                hidden, -torch.inf
            )
        return self._masks[window]

    @cached_property
    def _rows(self) -> Tensor:
        return torch.arange(len(self.positions), device=self.positions.device)

    @cached_property
    def _masks(self) -> dict[int | None, Tensor]:
        return {}  # every layer's are the same
