"""Readers of data files, one file a format. Each gives records one by one, so that no file is in memory whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from accessory.data.readers.arrow import read_arrow, read_parquet
from accessory.data.readers.json_file import read_json, read_jsonl
from accessory.data.readers.opening import data_suffix
from accessory.data.readers.table import read_table
from accessory.data.readers.text import read_text
from accessory.data.records import Record

READERS: dict[str, Callable[[Path, list[str]], Iterator[Record]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".txt": read_text,
}
"""Suffix of a data file -> (path, notes) -> its records; `notes` is told how the file was read."""
SUFFIXES = tuple(READERS)


def is_data(path: Path) -> bool:
    """Whether the name is one of a data file, packed by gzip or not."""
    return data_suffix(path) in READERS


def read_records(path: Path, notes: list[str] | None = None, txt: str | None = None) -> Iterator[Record]:
    """The records of a data file, read as its suffix says; how is appended to `notes` once the first one is asked for.

    txt: what of a .txt is one record. Raises `DataError` for a file that is missing, undecodable, not of its kind, or
    breaks off. What is wrong with one record only is that record's `fault`.
    """
    suffix, notes = data_suffix(path), [] if notes is None else notes
    if suffix == ".txt":
        yield from read_text(path, notes, txt)
    else:
        yield from READERS[suffix](path, notes)
