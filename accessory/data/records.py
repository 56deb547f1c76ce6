"""Reads data files into records that know their line."""

from __future__ import annotations

import bisect
import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accessory.errors import DataError
from accessory.tokenizer.sniff import what_is

_LISTED = "a JSON list of objects, an object a line, one object, or one that holds one list of objects"
_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
_SHOWN, _LONGEST = 12, 40  # keys named in a message, and characters of each
_SPACE = re.compile(r"[ \t\n\r]*")
_FIRST_LINE, _NOT_BLANK = re.compile(rb"(?:\xef\xbb\xbf)?\s*([^\n]*)"), re.compile(rb"\S")
_EXCEL = re.compile(r"sep=([\t,;])\r?\n")
_HEADER = re.compile(r'(?:"[^"]*"|[^"\n])*')
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}


@dataclass(frozen=True)
class Record:
    """One entry of a data file. `fault` says why it cannot be read, if it cannot.

    number: its place among the records of its file, from 1 on, if its line holds others too; 0 if the line is enough.
    """

    fields: dict[str, Any]
    line: int
    fault: str | None = None
    number: int = 0


def kind(value: Any) -> str:
    """What a decoded JSON value is, in the words of JSON: "a list", "null", ..."""
    return _KINDS.get(type(value), "a number")


def read_records(path: Path, notes: list[str] | None = None) -> list[Record]:
    """All records of a JSON list, of JSON Lines, or of a table with a header; how it was read is appended to `notes`.

    A .json may also hold one object a line, one object, or one with one list of objects in it; a .jsonl a list. A .csv
    is separated by tabs, commas or semicolons, whichever its header holds, or as Excel's `sep=` above it says; a .tsv
    by tabs.

    Raises `DataError` for a file that is missing, undecodable, not of its kind, or breaks off. A record that is not an
    object, repeats a key or holds NaN is returned with its `fault`; so is a line of JSON Lines that is no JSON, or no
    UTF-8, if any other line is.
    """
    notes = [] if notes is None else notes
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if path.suffix.lower() in (".csv", ".tsv"):
        return list(_read_table(_text(content, path), path, notes))
    return _read_json(content, path, notes)


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"found {what_is(path)}, which is not UTF-8 (byte {error.start}); save it as UTF-8"
        how = f": iconv -f {'UTF-16' if 'UTF-16' in found else 'WINDOWS-1252'} -t UTF-8 {path} > NEW"
        raise DataError(f"{path}: {found}{how if 'text' in found else ''}.") from error


def _read_json(content: bytes, path: Path, notes: list[str]) -> list[Record]:
    first, named_lines = _FIRST_LINE.match(content), path.suffix.lower() == ".jsonl"
    goes_on = _NOT_BLANK.search(content, first.end())
    if (named_lines and not first[1].startswith(b"[")) or (goes_on and _is_json(first[1])):
        notes += [] if named_lines else ["read as JSON Lines, an object a line"]
        return _read_lines(content, path)
    text = _text(content, path)
    start = _after_space(text, 0)
    if text[start : start + 1] == "{":
        return _read_list(f"{text}]", _list_within(text, start, path, notes), path)[0]
    if text[start : start + 1] != "[":
        raise DataError(f"{path}: found {what_is(path)}; expected {_LISTED}.")
    records, end = _read_list(text, start, path)
    if _after_space(text, end) != len(text):
        line = text.count("\n", 0, end) + 1
        raise DataError(f"{path}:{line}: goes on after the end of the list; expected one JSON list.")
    return records


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _read_list(text: str, start: int, path: Path) -> tuple[list[Record], int]:
    """The records of the list that opens at `start`, and where the text goes on after it."""
    newlines = [match.start() for match in re.finditer("\n", text)]
    decoder, records = _StrictDecoder(), []
    at = _after_space(text, start + 1)
    more = text[at : at + 1] != "]"
    while more:
        line = bisect.bisect_left(newlines, at) + 1
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = f"{path}:{getattr(error, 'lineno', line)}"
            raise DataError(f"{where}: is not valid JSON in record {len(records) + 1} ({_reason(error)}).") from error
        records.append(decoder.record(value, line))
        at = _after_space(text, end)
        more = text[at : at + 1] == ","
        if not more and text[at : at + 1] != "]":
            line = bisect.bisect_left(newlines, end) + 1
            raise DataError(f"{path}:{line}: expected ',' or ']' after record {len(records)}.")
        at = _after_space(text, at + 1) if more else at
    on_line = Counter(record.line for record in records)
    numbered = [replace(r, number=n) if on_line[r.line] > 1 else r for n, r in enumerate(records, 1)]
    return numbered, at + 1


def _list_within(text: str, start: int, path: Path, notes: list[str]) -> int:
    """Where a list of records opens in the object at `start`: its one list of objects, or before it, as one record."""
    try:
        values = json.loads(text[start:])
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, start) + getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: is not valid JSON ({_reason(error)}); expected {_LISTED}.") from error
    lists = [key for key, value in values.items() if _holds_records(value)]
    if values and not lists:
        notes.append("read as one record")
        return start - 1
    if len(lists) != 1:
        found = f"{len(lists)} lists of objects in it ({shown_keys(lists)})" if lists else "an empty object"
        raise DataError(f"{path}: found {found}; expected {_LISTED}.")
    (key,) = lists
    others = [other for other in values if other != key]
    notes.append(f"the list {key!r} is read" + (f"; not used: {shown_keys(others)}" if others else ""))
    return _place_of(key, text, start, path)


def _holds_records(value: Any) -> bool:
    """Whether it is a list of objects that are no turns of a conversation."""
    return isinstance(value, list) and any(isinstance(v, dict) and not {"from", "value"} <= v.keys() for v in value)


def _place_of(key: str, text: str, at: int, path: Path) -> int:
    """Position of the value of `key` in a valid JSON object that opens at `at`."""
    decoder, places = json.JSONDecoder(), {}
    while text[at] != "}":
        found, at = decoder.raw_decode(text, _after_space(text, at + 1))
        if found in places:
            raise DataError(f"{path}: holds the key {found!r} twice.")
        places[found] = _after_space(text, _after_space(text, at) + 1)
        at = _after_space(text, decoder.raw_decode(text, places[found])[1])
    return places[key]


def shown_keys(keys: Iterable[str]) -> str:
    """Names for a message, the first dozen of them."""
    names = [repr(key[:_LONGEST]) for key in keys]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _read_lines(content: bytes, path: Path) -> list[Record]:
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    decoder, records, unreadable = _StrictDecoder(), [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = decoder.record(decoder.decode(line.decode("utf-8")), number)
        except (ValueError, RecursionError) as error:
            decoder.fault, unreadable = None, unreadable + 1
            record = Record({}, number, f"is not valid JSON ({_reason(error)})")
        records.append(record)
    if records and unreadable == len(records):
        first = records[0]
        raise DataError(f"{path}:{first.line}: {first.fault}; found {what_is(path)}, expected an object a line.")
    return records


def _read_table(text: str, path: Path, notes: list[str]) -> Iterator[Record]:
    excel = _EXCEL.match(text)
    separator = excel[1] if excel else "\t" if path.suffix.lower() == ".tsv" else _separator(text, path)
    csv.field_size_limit(max(len(text), csv.field_size_limit()))
    rows = csv.reader(io.StringIO(text), delimiter=separator, strict=True)
    named = _SEPARATORS[separator]
    notes.append(f"columns separated by {named}")
    try:
        header = [next(rows, []) for _ in range(2 if excel else 1)][-1]
        if len(set(header)) != len(header) or len(header) < 2:
            raise DataError(
                f"{path}:{rows.line_num or 1}: the columns are {header}; expected two or more, separated by {named}, "
                "none of them twice."
            )
        line = rows.line_num + 1
        for row in rows:
            fault = None if len(row) == len(header) else "has more or fewer columns than the header"
            if row:
                yield Record({} if fault else dict(zip(header, row, strict=True)), line, fault)
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: is not a table separated by {named} ({error}).") from error


def _separator(text: str, path: Path) -> str:
    """The separator: tabs, commas or semicolons, whichever alone stands in the header outside of quotes."""
    header = _HEADER.match(text)[0]
    bare = re.sub(r'"[^"]*"', "", header)
    found = [separator for separator in _SEPARATORS if separator in bare]
    if len(found) != 1:
        held = " and ".join(_SEPARATORS[separator] for separator in found) or "nothing that separates columns"
        raise DataError(
            f"{path}:1: the header {header[:200]!r} holds {held}; expected tabs, commas or semicolons, and only one of "
            "these outside of quotes. Name a file .tsv if tabs separate it whatever its header holds."
        )
    return found[0]


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

    def record(self, value: Any, line: int) -> Record:
        """The record of a value just decoded, with whatever fault was met on the way."""
        fault, self.fault = self.fault, None
        if not isinstance(value, dict):
            fault, value = f"is {kind(value)}, not an object", {}
        return Record(value, line, fault)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return getattr(error, "msg", str(error))
