"""Which documents are held out for validation: their own content decides, whatever their place and number."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np

from accessory.data.corpus import Corpus
from accessory.errors import DataError

_BYTES = 8  # of a digest


def held_out(corpus: Corpus, share: float) -> np.ndarray:
    """Mark about the `share` of the documents that is held out, bool [documents].

    A record is held out if the digest of its tokens says so. It thus stays on its side if others come or go, equal
    records are on the same side, and so are all documents that were made of one record. Raises `DataError` if that
    holds out none, or all.
    """
    record_of, digests = _records(corpus)
    places = digests / 2.0 ** (8 * _BYTES)  # evenly spread over 0 to 1
    chosen = places < share
    if not chosen.any():
        raise DataError(
            f"--val_split {share:g} holds out none of the {len(places):,} records; the smallest share that holds out "
            f"one of them is {_rounded_up(places.min())}. Give that or more, or documents of their own with --val_data."
        )
    if chosen.all():
        raise DataError(
            f"--val_split {share:g} holds out all {len(places):,} records and leaves none to train on: give less."
        )
    return chosen[record_of]


def in_common(corpus: Corpus, other: Corpus) -> int:
    """How many records of `corpus` are in `other`, too, token for token."""
    return int(np.isin(_records(corpus)[1], _records(other)[1]).sum())


def _records(corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """(the record of each document, int64 [documents]; a digest of each one's tokens and image, uint64 [records])."""
    origins = corpus.origins
    first = np.concatenate(([True], (origins[1:] != origins[:-1]).any(axis=1)))
    bounds = corpus.offsets[np.append(np.flatnonzero(first), len(corpus))]
    names = (corpus.image_name(document) for document in np.flatnonzero(first).tolist())
    parts = (
        corpus.tokens[begin:end].tobytes() + (name or "").encode()
        for (begin, end), name in zip(pairwise(bounds), names, strict=True)
    )
    digests = (hashlib.blake2b(part, digest_size=_BYTES).digest() for part in parts)
    return np.cumsum(first) - 1, np.frombuffer(b"".join(digests), dtype="<u8")


def _rounded_up(place: float) -> float:
    """In four digits, and above `place`."""
    digits = 3 - int(np.floor(np.log10(place)))
    return float(np.ceil(place * 10.0**digits + 0.5) / 10.0**digits)
