"""A micro-batch: documents packed end to end, never padded, and what they begin alike with only once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position whose next token is not to be learned."""
WORTH_SHARING = 10
"""Beginnings are shared if that spares one token in so many. Attention lays documents out whole again, and keeps them
so: for fewer, that would take more memory than it spares."""

Document = tuple[np.ndarray, np.ndarray, int]
"""Tokens, labels, id."""


@dataclass(frozen=True)
class PackedBatch:
    """B documents in T tokens.

    tokens: int64 [T]. labels: int64 [T]; `labels[i]` is the token to predict after `tokens[i]` within its document, or
    `IGNORE`. lengths: tokens of each document. sample_ids: which documents they are. shared: how many tokens, none of
    them with a label, each document begins with as the one before it does. Those are packed only there, so that
    `lengths` less `shared` sum to T.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    sample_ids: tuple[int, ...]
    shared: tuple[int, ...]

    @staticmethod
    def pack(documents: Sequence[Document], share: bool = True) -> PackedBatch:
        """Lay documents end to end: as they are given, or sorted, where `share` is allowed and worth it."""
        shared = (0,) * len(documents)
        if share:
            alike = sorted(documents, key=lambda document: document[0].tolist())
            found = (0, *map(_common_beginning, alike, alike[1:]))
            if sum(found) * WORTH_SHARING >= sum(len(tokens) for tokens, _, _ in documents):
                documents, shared = alike, found
        tokens, labels, ids = zip(*documents, strict=True)
        return PackedBatch(
            _packed(tokens, shared),
            _packed(labels, shared),
            tuple(len(document) for document in tokens),
            tuple(int(i) for i in ids),
            shared,
        )

    @staticmethod
    def idle(token: int) -> PackedBatch:
        """One token and nothing to learn: what a rank steps on when a short last batch has no document for it."""
        return PackedBatch(torch.tensor([token]), torch.tensor([IGNORE]), (1,), (), (0,))

    @property
    def supervised(self) -> int:
        """Labels that count."""
        return int((self.labels >= 0).sum())

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory."""
        return replace(self, tokens=self.tokens.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on `device`."""
        tokens, labels = (t.to(device, non_blocking=non_blocking) for t in (self.tokens, self.labels))
        return replace(self, tokens=tokens, labels=labels)


def _packed(parts: Sequence[np.ndarray], shared: tuple[int, ...]) -> Tensor:
    new = [part[known:] for part, known in zip(parts, shared, strict=True)]
    return torch.from_numpy(np.concatenate(new).astype(np.int64))


def _common_beginning(one: Document, other: Document) -> int:
    """With how many tokens both begin, up to the first that has a label in either."""
    length = min(len(one[0]), len(other[0]))
    ends = one[0][:length] != other[0][:length]
    for _, labels, _ in (one, other):
        ends = ends | (labels[:length] >= 0)
    return int(ends.argmax()) if ends.any() else length
