"""Tells the forms of a JSON file apart, and reads it in the one it has."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from accessory.data.readers.json_lines import read_lines
from accessory.data.readers.json_list import read_list
from accessory.data.readers.opening import opened
from accessory.data.readers.strict_json import is_json
from accessory.data.records import Record


def read_json(path: Path, notes: list[str]) -> Iterator[Record]:
    """The records of a .json, which has a list, an object or an object a line. Raises `DataError`."""
    first, goes_on = _first_line(path)
    if not (goes_on and is_json(first)):
        return read_list(path, notes)
    notes.append("read as JSON Lines, an object a line")
    return read_lines(path)


def read_jsonl(path: Path, notes: list[str]) -> Iterator[Record]:
    """The records of a .jsonl, which has an object a line, or all the same a list. Raises `DataError`."""
    first, goes_on = _first_line(path)
    is_list = first.startswith(b"[") and not (goes_on and is_json(first))
    return read_list(path, notes) if is_list else read_lines(path)


def _first_line(path: Path) -> tuple[bytes, bool]:
    """The first line that is not blank, without the space around it, and whether another one follows."""
    with opened(path) as file:
        lines = (line.removeprefix(codecs.BOM_UTF8).strip() for line in file)
        found = (line for line in lines if line)
        return next(found, b""), next(found, None) is not None
