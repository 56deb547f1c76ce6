"""Reads plain text: each paragraph, each line, or the whole file is one record with the key `text`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from accessory.data.readers.opening import lines_of, opened
from accessory.data.records import Record

UNITS = ("paragraphs", "lines", "whole")
"""What of a text may be one record, the default first."""
_NAMED = {
    "paragraphs": "each paragraph, up to a blank line, is a record",
    "lines": "each line is a record",
    "whole": "the whole file is a record",
}


def read_text(path: Path, notes: list[str], unit: str | None = None) -> Iterator[Record]:
    """Records {"text": ...} of a file of UTF-8 text, blank ones left out. unit: one of `UNITS`; None: the default.

    Raises `DataError` where the file cannot be read.
    """
    others = " or ".join(f"`txt: {other}`" for other in UNITS[1:])
    notes.append(_NAMED[unit or UNITS[0]] + ("" if unit else f" (the default; {others} in the YAML change that)"))
    with opened(path) as file:
        lines = enumerate((line.rstrip("\r\n") for line in lines_of(file, path)), 1)
        if unit == "lines":
            yield from (Record({"text": line}, number) for number, line in lines if line.strip())
        elif unit == "whole":
            yield from _joined(lines)
        else:
            for is_text, paragraph in groupby(lines, key=lambda numbered: bool(numbered[1].strip())):
                yield from _joined(paragraph) if is_text else ()


def _joined(lines: Iterator[tuple[int, str]]) -> Iterator[Record]:
    """One record of the lines, from the first that is not blank to the last; none if all are."""
    numbered = list(lines)
    first = next((number for number, line in numbered if line.strip()), None)
    if first is not None:
        yield Record({"text": "\n".join(line for number, line in numbered if number >= first).rstrip()}, first)
