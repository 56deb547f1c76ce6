"""What a data file holds: records that know their line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_SHOWN, _LONGEST = 12, 40  # keys named in a message, and characters of each
_FEW = 8  # of many names
_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null", bytes: "bytes"}


@dataclass(frozen=True)
class Record:
    """One entry of a data file. `fault` says why it cannot be read, if it cannot.

    line: where it begins, from 1 on; in a file without lines, such as Parquet, its row.
    number: its place among the records of its file, from 1 on, if its line holds others too; 0 if the line is enough.
    """

    fields: dict[str, Any]
    line: int
    fault: str | None = None
    number: int = 0


def kind(value: Any) -> str:
    """What a decoded value is, in the words of JSON: "a list", "null", ..."""
    if found := _KINDS.get(type(value)):
        return found
    return "a number" if isinstance(value, int | float) else f"of the type {type(value).__name__}"


def some(names: Sequence[object]) -> str:
    """The first of many names for a message, and how many more there are."""
    more = len(names) - _FEW
    return ", ".join(map(str, names[:_FEW])) + (f" and {more:,} more" if more > 0 else "")


def shown_keys(keys: Iterable[str]) -> str:
    """Names for a message, the first dozen of them."""
    names = [repr(key[:_LONGEST]) for key in keys]
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
