"""A micro-batch: documents packed end to end, never padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Label of a position whose next token is not to be learned."""


@dataclass(frozen=True)
class PackedBatch:
    """B documents in T tokens.

    tokens: int64 [T]. labels: int64 [T]; `labels[i]` is the token to predict after `tokens[i]` within its document, or
    `IGNORE`. lengths: tokens of each document, summing to T. sample_ids: which documents they are.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    sample_ids: tuple[int, ...]

    @staticmethod
    def pack(documents: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> PackedBatch:
        """Lay (tokens, labels, id) triples end to end."""
        tokens, labels, ids = zip(*documents, strict=True)
        return PackedBatch(
            torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
            torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            tuple(len(document) for document in tokens),
            tuple(int(i) for i in ids),
        )

    @staticmethod
    def idle(token: int) -> PackedBatch:
        """One token and nothing to learn: what a rank steps on when a short last batch has no document for it."""
        return PackedBatch(torch.tensor([token]), torch.tensor([IGNORE]), (1,), ())

    @property
    def supervised(self) -> int:
        """Labels that count."""
        return int((self.labels >= 0).sum())

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory."""
        return PackedBatch(self.tokens.pin_memory(), self.labels.pin_memory(), self.lengths, self.sample_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on `device`."""
        tokens, labels = (t.to(device, non_blocking=non_blocking) for t in (self.tokens, self.labels))
        return PackedBatch(tokens, labels, self.lengths, self.sample_ids)
