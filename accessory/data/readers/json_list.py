"""Reads a JSON list of records, or an object that holds one; the text is in memory once, and one record of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accessory.data.readers.opening import content_of, text_of
from accessory.data.readers.strict_json import StrictDecoder, reason
from accessory.data.records import Record, shown_keys
from accessory.errors import DataError

LISTED = "a JSON list of objects, an object a line, one object, or one that holds one list of objects"
HELD_OUT = frozenset({"test", "validation", "valid", "val", "dev", "eval"})
"""Names of what is not trained on, where something else is called train."""
_SPACE = re.compile(r"[ \t\n\r]*")


def read_list(path: Path, notes: list[str]) -> Iterator[Record]:
    """The records of the file's list, or of the one list of objects in its object, else that object as one record.

    Raises `DataError` where the text is not JSON, goes on after the list, or has several lists to choose from.
    """
    text = text_of(path)
    start = _after_space(text, 0)
    opening = text[start : start + 1]
    if opening not in ("{", "["):
        raise DataError(f"{path}: found {content_of(path)}; expected {LISTED}.")
    if opening == "[":
        yield from _numbered(_records(text, start, path, to_the_end=True))
        return
    within = _list_within(text, start, path, notes)
    if within is None:
        decoder = StrictDecoder()
        yield decoder.record(decoder.raw_decode(text, start)[0], text.count("\n", 0, start) + 1)
    else:
        yield from _numbered(_records(text, within, path, to_the_end=False))


def _records(text: str, start: int, path: Path, *, to_the_end: bool) -> Iterator[Record]:
    """The records of the list that opens at `start`; `to_the_end`: nothing may follow it."""
    decoder, count = StrictDecoder(), 0
    line, counted = 1, 0  # `line` is that of the character `counted`
    at = _after_space(text, start + 1)
    more = text[at : at + 1] != "]"
    while more:
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = f"{path}:{getattr(error, 'lineno', line)}"
            raise DataError(f"{where}: is not valid JSON in record {count + 1} ({reason(error)}).") from error
        count += 1
        yield decoder.record(value, line)
        at = _after_space(text, end)
        more = text[at : at + 1] == ","
        if not more and text[at : at + 1] != "]":
            line += text.count("\n", counted, end)
            raise DataError(f"{path}:{line}: expected ',' or ']' after record {count}.")
        at = _after_space(text, at + 1) if more else at
    if to_the_end and _after_space(text, at + 1) != len(text):
        line = text.count("\n", 0, at + 1) + 1
        raise DataError(f"{path}:{line}: goes on after the end of the list; expected one JSON list.")


def _numbered(records: Iterator[Record]) -> Iterator[Record]:
    """The records, those with a number that share their line with the one before or after."""
    held, shares = None, False
    for number, record in enumerate(records, 1):
        if held is not None:
            joined = record.line == held.line
            yield replace(held, number=number - 1) if shares or joined else held
            shares = joined
        held = record
    if held is not None:
        yield replace(held, number=number) if shares else held


def _list_within(text: str, start: int, path: Path, notes: list[str]) -> int | None:
    """Where the one list of objects opens in the object at `start`; None if it has none, and is one record itself."""
    try:
        values = json.loads(text[start:] if start else text)
    except (ValueError, RecursionError) as error:
        line = text.count("\n", 0, start) + getattr(error, "lineno", 1)
        raise DataError(f"{path}:{line}: is not valid JSON ({reason(error)}); expected {LISTED}.") from error
    lists = [key for key, value in values.items() if _holds_records(value)]
    if "train" in lists and HELD_OUT.issuperset(key for key in lists if key != "train"):
        lists = ["train"]
    if values and not lists:
        notes.append("read as one record")
        return None
    if len(lists) != 1:
        remedy = f"; keep one, or write each to a file of its own: jq .{lists[0]} {path} > NEW.json" if lists else ""
        found = f"{len(lists)} lists of objects in it ({shown_keys(lists)})" if lists else "an empty object"
        raise DataError(f"{path}: found {found}; expected {LISTED}{remedy}.")
    (key,) = lists
    others = [other for other in values if other != key]
    notes.append(f"the list {key!r} is read" + (f"; not used: {shown_keys(others)}" if others else ""))
    return _place_of(key, text, start, path)


def _holds_records(value: Any) -> bool:
    """Whether it is a list of objects that are no turns of a conversation."""
    turns = ({"from", "value"}, {"role", "content"})
    return isinstance(value, list) and any(
        isinstance(v, dict) and not any(keys <= v.keys() for keys in turns) for v in value
    )


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


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()
