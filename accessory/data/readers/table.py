"""Reads a table of text with a header, separated by tabs, commas or semicolons, one row in memory at a time."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from accessory.data.readers.opening import data_suffix, lines_of, opened
from accessory.data.records import Record
from accessory.errors import DataError

_SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}
_EXCEL = re.compile(r"sep=([\t,;])\r?\n")
_ONE = re.compile(r'\s*"?\w+"?\s*')  # the header of a table with one column
_SHOWN = 200  # characters of a header in a message


def read_table(path: Path, notes: list[str]) -> Iterator[Record]:
    """The rows below the header as records; a row of more or fewer columns has a fault.

    A .csv is separated by whichever its header holds, or as Excel's `sep=` above it says; a .tsv by tabs.
    Raises `DataError` where that is not told, the header is none, or the quotes do not pair up.
    """
    with opened(path) as file:
        lines = lines_of(file, path)
        head = _header(lines)
        excel = _EXCEL.fullmatch(head[0]) if head else None
        separator = excel[1] if excel else "\t" if data_suffix(path) == ".tsv" else _separator("".join(head), path)
        notes.append(f"columns separated by {_SEPARATORS[separator]}")
        yield from _rows(chain(head[1:] if excel else head, lines), separator, path, skipped=1 if excel else 0)


def _header(lines: Iterator[str]) -> list[str]:
    """The first lines, up to one that ends outside of quotes."""
    found, quotes = [], 0
    for line in lines:
        found.append(line)
        quotes += line.count('"')
        if quotes % 2 == 0:
            break
    return found


def _rows(lines: Iterator[str], separator: str, path: Path, *, skipped: int) -> Iterator[Record]:
    """The records of the lines from the header on. skipped: lines of the file above it."""
    csv.field_size_limit(sys.maxsize)  # a cell may be a book
    rows, named = csv.reader(lines, delimiter=separator, strict=True), _SEPARATORS[separator]
    try:
        header = next(rows, [])
        if len(set(header)) != len(header) or not (len(header) > 1 or _ONE.fullmatch("".join(header))):
            raise DataError(
                f"{path}:{rows.line_num + skipped or 1}: the columns are {header}; expected one word, or two or more "
                f"names separated by {named}, none of them twice."
            )
        line = rows.line_num + skipped + 1
        for row in rows:
            if row:
                yield _record(row, header, line, separator)
            line = rows.line_num + skipped + 1
    except csv.Error as error:
        raise DataError(
            f"{path}:{rows.line_num + skipped}: is not a table separated by {named} ({error}); a cell that holds a "
            'quote stands in quotes, and the quote twice: "so ""called"" cells".'
        ) from error


def _record(row: list[str], header: list[str], line: int, separator: str) -> Record:
    if len(row) == len(header):
        return Record(dict(zip(header, row, strict=True)), line)
    named = _SEPARATORS[separator]
    remedy = f"cells that hold {named} or line breaks stand in quotes"
    return Record({}, line, f"has {len(row)} columns, the header has {len(header)}: {remedy}")


def _separator(header: str, path: Path) -> str:
    """The separator: tabs, commas or semicolons, whichever alone stands in the header outside of quotes.

    Commas where the header is one word: then the table has one column.
    """
    bare = re.sub(r'"[^"]*"', "", header)
    found = [separator for separator in _SEPARATORS if separator in bare]
    if not found and _ONE.fullmatch(header):
        return ","
    if len(found) != 1:
        held = " and ".join(_SEPARATORS[separator] for separator in found) or "nothing that separates columns"
        raise DataError(
            f"{path}:1: the header {header[:_SHOWN].rstrip()!r} holds {held}; expected tabs, commas or semicolons, and "
            "only one of these outside of quotes. Name a file .tsv if tabs separate it whatever its header holds."
        )
    return found[0]
