"""A micro-batch: documents packed end to end, without padding; a prefix that several share is packed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from accessory.data.pictures import Picture

IGNORE = -100
"""Label of a position whose next token is not to be learned."""
WORTH_SHARING = 10
"""Prefixes are shared if that saves one token in so many. Attention copies them into each document again and keeps the
copies for the backward: with fewer, these would take more memory than sharing saves."""


@dataclass(frozen=True, eq=False)
class Inset:
    """`rows` embeddings in place of as many placeholder tokens, which are not predicted, from `start` on of a document
    or batch.

    content: the embeddings [rows, embedding_dim], or the picture, or the name, of what `MetaModel.encoder` makes them.
    With 0 rows the content belongs to the document, and enters the model otherwise.
    """

    start: int
    rows: int
    content: Tensor | Picture | str

    @cached_property
    def key(self) -> int:
        """A negative number, equal for two insets only if their contents are."""
        held = self.content
        if isinstance(held, Tensor):
            data = held.detach().cpu().contiguous().view(torch.uint8).numpy()
        else:
            data = held.encode() if isinstance(held, str) else held.digest
        digest = hashlib.blake2b(data, digest_size=7, salt=self.rows.to_bytes(8)).digest()
        return -1 - int.from_bytes(digest)

    def to(self, start: int, device: torch.device | str | None = None, **how: bool) -> Inset:
        """The same inset at another `start`, on `device`."""
        moves = device is not None and isinstance(self.content, Tensor)
        return Inset(start, self.rows, self.content.to(device, **how) if moves else self.content)


class Document(NamedTuple):
    """tokens, labels, weights, answers [S] as in `PackedBatch`; insets in order, their `start` counted from its own."""

    tokens: np.ndarray
    labels: np.ndarray
    id: int
    insets: tuple[Inset, ...] = ()
    weights: np.ndarray | None = None
    answers: np.ndarray | None = None


@dataclass(frozen=True)
class PackedBatch:
    """B documents in T tokens.

    tokens: int64 [T]. labels: int64 [T]; `labels[i]` is the token to predict after `tokens[i]` within its document, or
    `IGNORE`. lengths: tokens of each document. sample_ids: which documents they are. shared: tokens of the prefix,
    without labels where there are no weights, that each document shares with the one before it. It is packed only
    there, so that `lengths` minus `shared` sum to T. insets: of all documents, their `start` counted in the batch's T
    tokens. weights: fp32 [T], by which the loss of each label is multiplied, the sum of those of all documents that
    share the token; None: all are 1. answers: fp32 [T], in how many of these documents the label belongs to an answer,
    which accuracy is measured on; there only where weights are. rows: int64 [L], the tokens that have a label. The
    host finds them before a batch goes to a GPU, since finding them there would make the host wait; else None.
    """

    tokens: Tensor
    labels: Tensor
    lengths: tuple[int, ...]
    sample_ids: tuple[int, ...]
    shared: tuple[int, ...]
    insets: tuple[Inset, ...] = ()
    weights: Tensor | None = None
    answers: Tensor | None = None
    rows: Tensor | None = None

    @staticmethod
    def pack(documents: Sequence[Document], share: bool = True) -> PackedBatch:
        """Lay documents end to end, in the order given; sorted, if they may `share` prefixes and that is worth it."""
        documents = [Document(*document) for document in documents]
        shared = (0,) * len(documents)
        if share:
            alike = sorted(documents, key=lambda document: _keyed(document).tolist())
            found = (0, *map(_common_prefix, alike, alike[1:]))
            if sum(found) * WORTH_SHARING >= sum(len(document.tokens) for document in documents):
                documents, shared = alike, found
        tokens, labels, ids, _, weights, answers = zip(*documents, strict=True)
        return PackedBatch(
            _packed(tokens, shared),
            _packed(labels, shared),
            tuple(len(document) for document in tokens),
            tuple(int(i) for i in ids),
            shared,
            _packed_insets(documents, shared),
            *(None if each[0] is None else _packed_sums(each, shared) for each in (weights, answers)),
        )

    @staticmethod
    def idle(token: int) -> PackedBatch:
        """One token and no label, for a rank that gets no document of a short last batch."""
        return PackedBatch(torch.tensor([token]), torch.tensor([IGNORE]), (1,), (), (0,))

    @property
    def supervised(self) -> int:
        """Number of supervised tokens."""
        return int((self.labels >= 0).sum())

    @property
    def labelled(self) -> Tensor:
        """The tokens that have a label, int64 [L]."""
        return (self.labels >= 0).nonzero()[:, 0] if self.rows is None else self.rows

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory."""
        tensors = {name: tensor.pin_memory() for name, tensor in self._tensors()}
        return replace(self, **tensors)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on `device`."""
        tensors = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors()}
        insets = tuple(inset.to(inset.start, device, non_blocking=non_blocking) for inset in self.insets)
        return replace(self, insets=insets, **tensors)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in ("tokens", "labels", "weights", "answers"):
            if (tensor := getattr(self, name)) is not None:
                yield name, tensor
        yield "rows", self.labelled


def _packed(parts: Sequence[np.ndarray], shared: tuple[int, ...]) -> Tensor:
    new = [part[known:] for part, known in zip(parts, shared, strict=True)]
    return torch.from_numpy(np.concatenate(new).astype(np.int64))


def _packed_sums(parts: Sequence[np.ndarray], shared: tuple[int, ...]) -> Tensor:
    """Weights and the like, fp32; of shared tokens they are summed: their losses are equal in all documents."""
    found = np.zeros(sum(map(len, parts)) - sum(shared), dtype=np.float32)
    places, begin = np.zeros(0, dtype=np.int64), 0
    for part, known in zip(parts, shared, strict=True):
        end = begin + len(part) - known
        places, begin = np.concatenate([places[:known], np.arange(begin, end)]), end
        found[places] += part
    return torch.from_numpy(found)


def _packed_insets(documents: Sequence[Document], shared: tuple[int, ...]) -> tuple[Inset, ...]:
    found, begin = [], 0
    for document, known in zip(documents, shared, strict=True):
        found += [inset.to(begin + inset.start - known) for inset in document.insets if inset.start >= known]
        begin += len(document.tokens) - known
    return tuple(found)


def _keyed(document: Document) -> np.ndarray:
    """The document's tokens [S]; where an inset starts, its key, so that other insets make other documents."""
    if not document.insets:
        return document.tokens
    keyed = document.tokens.astype(np.int64)
    for inset in document.insets:
        keyed[inset.start] = inset.key
    return keyed


def _common_prefix(one: Document, other: Document) -> int:
    """Length of the prefix that both share, which no inset reaches out of. It ends before the first token with a label
    in either, if there are no weights; else before the first whose labels differ, so that shared tokens have one loss.
    """
    if any(inset.rows == 0 for inset in (*one.insets, *other.insets)):
        return 0  # what enters the model otherwise may change all tokens of its document
    length = min(len(one.tokens), len(other.tokens))
    ends = _keyed(one)[:length] != _keyed(other)[:length]
    if one.weights is not None:
        ends = ends | (one.labels[:length] != other.labels[:length])
        ends[len(other.tokens) - 1 :] = True  # each document has a token of its own
    else:
        ends = ends | (one.labels[:length] >= 0) | (other.labels[:length] >= 0)
    found = int(ends.argmax()) if ends.any() else length
    # An inset is shared as a whole: its last row may have a label.
    return min([found, *(inset.start for inset in one.insets if inset.start < found < inset.start + inset.rows)])
