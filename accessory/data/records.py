"""Reads data files into records that know their file and line."""

from __future__ import annotations

import bisect
import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.errors import DataError
from accessory.tokenizer.sniff import what_is

SUFFIXES = (".json", ".jsonl", ".csv")
_SPACE = re.compile(r"[\s,]*")


@dataclass(frozen=True)
class Record:
    """One entry of a data file. `fault` says why it cannot be read, if it cannot."""

    fields: dict[str, Any]
    path: Path
    line: int
    fault: str | None = None

    @property
    def where(self) -> str:
        """`file:line`."""
        return f"{self.path}:{self.line}"


def read_records(path: Path) -> list[Record]:
    """All records of a .json list, a .jsonl, or a tab-separated .csv with a header.

    Raises `DataError` for a file that is missing, undecodable, not of its kind, or breaks off. A record that is not an
    object, repeats a key or holds NaN is returned with its `fault`.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: is not a data file; expected one of {', '.join(SUFFIXES)}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: byte {error.start} cannot be decoded.") from error
    readers = {".json": _read_list, ".jsonl": _read_lines, ".csv": _read_table}
    return list(readers[path.suffix](text, path))


def _read_list(text: str, path: Path) -> Iterator[Record]:
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] != "[":
        raise DataError(f"{path}: found {what_is(path)}; expected a JSON list of objects.")
    newlines = [match.start() for match in re.finditer("\n", text)]
    decoder = _StrictDecoder()
    at = _SPACE.match(text, start + 1).end()
    while text[at : at + 1] != "]":
        line = bisect.bisect_left(newlines, at) + 1
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{_fault_line(error, line)}: is not valid JSON ({_reason(error)}).") from error
        yield decoder.record(value, path, line)
        at = _SPACE.match(text, end).end()
        if "," not in text[end:at] and text[at : at + 1] != "]":
            raise DataError(f"{path}:{bisect.bisect_left(newlines, end) + 1}: expected ',' or ']' after a record.")


def _read_lines(text: str, path: Path) -> Iterator[Record]:
    decoder = _StrictDecoder()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = decoder.decode(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: is not valid JSON ({_reason(error)}).") from error
        yield decoder.record(value, path, number)


def _read_table(text: str, path: Path) -> Iterator[Record]:
    rows = csv.DictReader(text.splitlines(keepends=True), delimiter="\t", strict=True)
    try:
        for row in rows:
            fault = "has more or fewer columns than the header" if None in row or None in row.values() else None
            yield Record({} if fault else dict(row), path, rows.line_num, fault)
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: is not a tab-separated table ({error}).") from error


class _StrictDecoder(json.JSONDecoder):
    """JSON as the standard has it: no NaN, and no key twice, of which Python would silently keep the last."""

    def __init__(self) -> None:
        super().__init__(parse_constant=self._constant, object_pairs_hook=self._pairs)
        self.fault: str | None = None

    def _constant(self, name: str) -> None:
        self.fault = f"holds {name}, which is not JSON"

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [name for name, _ in pairs]
            self.fault = f"holds the key {next(n for n in names if names.count(n) > 1)!r} twice"
        return value

    def record(self, value: Any, path: Path, line: int) -> Record:
        """The record of a value just decoded, with whatever fault was met on the way."""
        fault, self.fault = self.fault, None
        if not isinstance(value, dict):
            fault, value = f"is a {type(value).__name__}, not an object", {}
        return Record(value, path, line, fault)


def _fault_line(error: Exception, default: int) -> int:
    return error.lineno if isinstance(error, json.JSONDecodeError) else default


def _reason(error: Exception) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
