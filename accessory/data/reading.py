"""Reads the files of a data config: each record with the number of its entry, and what identifies the whole."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

from accessory.data.columns import renamed
from accessory.data.meta_config import DataEntry
from accessory.data.readers import read_records
from accessory.data.readers.opening import data_suffix, is_packed
from accessory.data.records import Record
from accessory.errors import DataError

_DIGITS = 32  # kept of a digest
_PLACES = frozenset({"path", "type", "root"})  # fields of an entry that make no other documents
_LATER = frozenset({"columns", "txt", "shape", "mask_history", "train_on_source"})
"""Fields that an identity holds only where they are given."""


def read_entries(entries: list[DataEntry], notes: list[tuple[int, str]]) -> Iterator[tuple[int, Record]]:
    """(number of its entry, record) for all that the entries' files hold and their `ratio` chooses, in order.

    What is to be said of an entry is appended to `notes` with its number. Raises `DataError` for a broken file.
    """
    for _, group in groupby(enumerate(entries), key=lambda numbered: numbered[1].source.number):
        yield from _read_group(list(group), notes)


def _read_group(group: list[tuple[int, DataEntry]], notes: list[tuple[int, str]]) -> Iterator[tuple[int, Record]]:
    """The records of files that share an entry of the data config, and so its ratio."""
    chosen, place = _chosen(group, notes), 0
    for number, entry in group:
        said: list[str] = []
        before = place
        for record in _records(entry, said):
            if chosen is None or chosen[place]:
                yield number, record
            place += 1
        said += ["holds no records"] if place == before else []
        notes += [(number, note) for note in said]


def _records(entry: DataEntry, notes: list[str]) -> Iterator[Record]:
    records = read_records(entry.path, notes, entry.txt)
    return renamed(records, entry.columns, entry.path) if entry.columns else records


def _chosen(group: list[tuple[int, DataEntry]], notes: list[tuple[int, str]]) -> np.ndarray | None:
    """bool [records]: which of the group's records `ratio` chooses; None: all. Counts them first, for little memory."""
    number, entry = group[0]
    if entry.ratio == 1:
        return None
    total = sum(1 for _, entry in group for _ in read_records(entry.path, txt=entry.txt))
    count = min(max(round(entry.ratio * total), 1), total)
    chosen = np.zeros(total, dtype=bool)
    chosen[np.random.default_rng(0).choice(total, count, replace=False)] = True
    notes.append((number, f"{count:,} of {total:,} records, as ratio {entry.ratio:g} says"))
    return chosen


def identity_of(entry: DataEntry) -> dict[str, Any]:
    """All that determines the records of an entry, as JSON: its settings, and the digest of its file's bytes.

    Raises `DataError` if the file cannot be read.
    """
    try:
        with entry.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{entry.path}: cannot be read ({error.strerror}).") from error
    said = entry.model_dump(mode="json", exclude=set(_PLACES))
    said = {key: value for key, value in said.items() if value or key not in _LATER}
    suffix = data_suffix(entry.path) + ".gz" * is_packed(entry.path)
    return {**said, "suffix": suffix, "content": content[:_DIGITS]}
