"""Reads JSON Lines: an object a line, one line in memory at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from accessory.data.readers.opening import content_of, opened
from accessory.data.readers.strict_json import StrictDecoder, reason
from accessory.data.records import Record
from accessory.errors import DataError


def read_lines(path: Path) -> Iterator[Record]:
    """The records of the lines that are not blank; one that is no JSON, or no UTF-8, has a fault.

    Raises `DataError` if no line can be read: then the file is of another kind.
    """
    decoder, unreadable = StrictDecoder(), []
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record = _record(decoder, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, number)
            if unreadable is not None and record.fault and record.fault.startswith(_UNREADABLE):
                unreadable.append(record)  # held back until a line shows that these are exceptions
                continue
            yield from unreadable or ()
            unreadable = None
            yield record
    if unreadable:
        first = unreadable[0]
        raise DataError(f"{path}:{first.line}: {first.fault}; found {content_of(path)}, expected an object a line.")


_UNREADABLE = "is not valid JSON"


def _record(decoder: StrictDecoder, line: bytes, number: int) -> Record:
    try:
        return decoder.record(decoder.decode(line.decode("utf-8")), number)
    except (ValueError, RecursionError) as error:
        decoder.fault = None
        return Record({}, number, f"{_UNREADABLE} ({reason(error)})")
