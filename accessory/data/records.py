"""Reads data files into records that know their file and line."""

from __future__ import annotations

import bisect
import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accessory.errors import DataError
from accessory.tokenizer.sniff import what_is

SUFFIXES = (".json", ".jsonl", ".csv")
_SPACE = re.compile(r"[ \t\n\r]*")
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}


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


def kind(value: Any) -> str:
    """What a decoded JSON value is, in the words of JSON: "a list", "null", ..."""
    return _KINDS.get(type(value), "a number")


def read_records(path: Path) -> list[Record]:
    """All records of a .json list, a .jsonl, or a tab-separated .csv with a header.

    Raises `DataError` for a file that is missing, undecodable, not of its kind, or breaks off. A record that is not an
    object, repeats a key or holds NaN is returned with its `fault`; so is a line of a .jsonl that is no JSON, or no
    UTF-8, unless not one is.
    """
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path}: is not a data file; expected one of {', '.join(SUFFIXES)}.")
    if path.suffix == ".jsonl":
        return _read_lines(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text: byte {error.start} cannot be decoded.") from error
    return list((_read_list if path.suffix == ".json" else _read_table)(text, path))


def _read_list(text: str, path: Path) -> Iterator[Record]:
    start = _after_space(text, 0)
    if text[start : start + 1] != "[":
        raise DataError(f"{path}: found {what_is(path)}; expected a JSON list of objects.")
    newlines = [match.start() for match in re.finditer("\n", text)]
    decoder = _StrictDecoder()
    at = _after_space(text, start + 1)
    more = text[at : at + 1] != "]"
    while more:
        line = bisect.bisect_left(newlines, at) + 1
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{_fault_line(error, line)}: is not valid JSON ({_reason(error)}).") from error
        yield decoder.record(value, path, line)
        at = _after_space(text, end)
        more = text[at : at + 1] == ","
        if not more and text[at : at + 1] != "]":
            raise DataError(f"{path}:{bisect.bisect_left(newlines, end) + 1}: expected ',' or ']' after a record.")
        at = _after_space(text, at + 1) if more else at
    if _after_space(text, at + 1) != len(text):
        line = bisect.bisect_left(newlines, at) + 1
        raise DataError(f"{path}:{line}: goes on after the end of the list; expected one JSON list.")


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _read_lines(path: Path) -> list[Record]:
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    decoder, records, unreadable = _StrictDecoder(), [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = decoder.record(decoder.decode(line.decode("utf-8")), path, number)
        except (ValueError, RecursionError) as error:
            decoder.fault, unreadable = None, unreadable + 1
            record = Record({}, path, number, f"is not valid JSON ({_reason(error)})")
        records.append(record)
    if records and unreadable == len(records):
        first = records[0]
        raise DataError(f"{first.where}: {first.fault}; found {what_is(path)}, expected an object a line.")
    return records


def _read_table(text: str, path: Path) -> Iterator[Record]:
    rows = csv.reader(io.StringIO(text), delimiter="\t", strict=True)
    try:
        header = next(rows, [])
        if len(set(header)) != len(header) or len(header) < 2:
            raise DataError(
                f"{path}:1: the columns are {header}; expected two or more, separated by tabs, none of them twice."
            )
        line = rows.line_num + 1
        for row in rows:
            fault = None if len(row) == len(header) else "has more or fewer columns than the header"
            if row:
                yield Record({} if fault else dict(zip(header, row, strict=True)), path, line, fault)
            line = rows.line_num + 1
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
            fault, value = f"is {kind(value)}, not an object", {}
        return Record(value, path, line, fault)


def _fault_line(error: Exception, default: int) -> int:
    return error.lineno if isinstance(error, json.JSONDecodeError) else default


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
