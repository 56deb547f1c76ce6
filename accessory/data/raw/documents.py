"""Reads documents out of the midst of a file of raw text: of JSON Lines, of plain text, or of Parquet."""

from __future__ import annotations

import codecs
import mmap
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from accessory.data.raw.files import RawFile
from accessory.data.readers.arrow import named_faults, open_parquet, release_memory
from accessory.data.readers.strict_json import StrictDecoder, reason
from accessory.errors import DataError, nearest

KEYS = ("content", "text")
"""Keys and columns that hold the text unless `--text_key` says which does; the first that is there counts."""
UNITS = ("whole", "lines", "paragraphs")
"""What of a .txt is one document, the default first."""
_SEARCHED = 1 << 14  # bytes in which a line has to end for a text to be cut at its end
_ROWS = 64  # of a Parquet file, decoded at a time
_PARTS = 64  # of a row group, at the most: what stands before a part has to be decoded to get there


class Piece(NamedTuple):
    """A document, or a part of one.

    text: None where it cannot be used, and `fault` says why. begins, ends: whether the document begins and ends with
    it. at, after: where it begins and what follows it, in bytes of the file or rows of the Parquet file.
    """

    text: str | None
    at: int
    after: int
    begins: bool = True
    ends: bool = True
    fault: str = ""


@dataclass(frozen=True)
class TextReader:
    """Reads documents of any kind of file. key: `--text_key`. unit: one of `UNITS`."""

    key: str | None = None
    unit: str = UNITS[0]

    def cut(self, file: RawFile, size: int) -> list[int]:
        """Places, 0 and the end among them, that cut the file into blocks of about `size` bytes of text.

        Documents lie within a block, but for a .txt that is one document. Raises `DataError`.
        """
        if file.kind == "parquet":
            return self._cut_rows(file, size)
        if file.size == 0:
            return [0]
        try:
            with file.path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return self._cut_bytes(file, data, size)
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read ({error.strerror}).") from error

    def _cut_bytes(self, file: RawFile, data: mmap.mmap, size: int) -> list[int]:
        end = re.compile(rb"\n\r?\n" if file.kind == "txt" and self.unit == "paragraphs" else rb"\n")
        places, whole = [0], file.kind == "txt" and self.unit == "whole"
        while places[-1] + size < file.size:
            near = places[-1] + size
            found = end.search(data, near - 1, near + _SEARCHED if whole else file.size)
            places.append(found.end() if found else _between_letters(data, near) if whole else file.size)
        return places if places[-1] == file.size else [*places, file.size]

    def _cut_rows(self, file: RawFile, size: int) -> list[int]:
        places = [0]
        with named_faults(file.path, "a Parquet file"):
            metadata = open_parquet(file.path).metadata
            for group in range(metadata.num_row_groups):
                held = metadata.row_group(group)
                column = self._column_number(file, held)
                wanted = held.column(column).total_uncompressed_size // size
                parts = max(min(wanted, held.num_rows, _PARTS), 1)
                places += [places[-1] + held.num_rows * (part + 1) // parts for part in range(parts)]
        return sorted(set(places))

    def _column_number(self, file: RawFile, group: Any) -> int:
        names = [group.column(number).path_in_schema for number in range(group.num_columns)]
        return names.index(self.named_in(file, names))

    def named_in(self, file: RawFile, names: list[str]) -> str:
        """Which of a Parquet file's columns holds the text. Raises `DataError` where none does."""
        for key in (self.key,) if self.key else KEYS:
            if key in names:
                return key
        wanted = self.key or " or ".join(KEYS)
        near = nearest(self.key, names) if self.key else ""
        raise DataError(f"{file.path}: has no column {wanted}, only {', '.join(names)}.{near} --text_key names it.")

    def read(self, file: RawFile, start: int, stop: int) -> Iterator[Piece]:
        """The documents from `start`, where one begins, to `stop`. Raises `DataError`."""
        if file.kind == "parquet":
            yield from self._rows(file, start, stop)
            return
        try:
            with file.path.open("rb") as opened:
                opened.seek(start)
                data = opened.read(stop - start)
        except OSError as error:
            raise DataError(f"{file.path}: cannot be read ({error.strerror}).") from error
        if file.kind == "jsonl":
            yield from self._json_lines(data, start)
        elif self.unit == "whole":
            text, fault = _decoded(data, first=start == 0)
            yield Piece(text, start, stop, start == 0, stop == file.size, fault)
        else:
            yield from _units(data, start, self.unit)

    def _json_lines(self, data: bytes, start: int) -> Iterator[Piece]:
        decoder = StrictDecoder()
        for line in _lines(data):
            at, start = start, start + len(line)
            if line.strip():
                text, fault = self._text_of(decoder, line.removeprefix(codecs.BOM_UTF8) if at == 0 else line)
                yield Piece(text, at, start, fault=fault)

    def _text_of(self, decoder: StrictDecoder, line: bytes) -> tuple[str | None, str]:
        try:
            record = decoder.record(decoder.decode(line.decode("utf-8")), 0)
        except (ValueError, RecursionError) as error:
            decoder.fault = None
            return None, f"is not valid JSON ({reason(error)})"
        if record.fault:
            return None, record.fault
        keys = (self.key,) if self.key else KEYS
        found = next((record.fields[key] for key in keys if key in record.fields), None)
        if isinstance(found, str):
            return (found, "") if _is_text(found) else (None, "holds half of a surrogate pair, which is no text")
        names = ", ".join(map(repr, record.fields))[:200] or "nothing"
        return None, f"has no text under {' or '.join(map(repr, keys))}; found {names} (--text_key)"

    def _rows(self, file: RawFile, start: int, stop: int) -> Iterator[Piece]:
        with named_faults(file.path, "a Parquet file"):
            parquet, first = open_parquet(file.path), 0
            column = self.named_in(file, parquet.schema_arrow.names)
            for group in range(parquet.num_row_groups):
                last = first + parquet.metadata.row_group(group).num_rows
                if first < stop and start < last:
                    yield from _rows_of(parquet, group, column, first, max(start, first), min(stop, last))
                first = last
        del parquet
        release_memory()


def _rows_of(parquet: Any, group: int, column: str, first: int, start: int, stop: int) -> Iterator[Piece]:
    """Rows `start` to `stop` of the file, which lie in a row group whose first row is number `first`."""
    batches = parquet.iter_batches(batch_size=_ROWS, row_groups=[group], columns=[column], use_threads=False)
    for batch in batches:
        behind = first + batch.num_rows
        if behind > start:
            batch.validate(full=True)  # what a damaged file says of its texts could lead out of memory that is its own
            for number, text in enumerate(batch.column(0).to_pylist(), first):
                if start <= number < stop:
                    held = isinstance(text, str)
                    fault = "" if held else f"has no text in column {column!r}, but {type(text).__name__}"
                    yield Piece(text if held else None, number, number + 1, fault=fault)
        if behind >= stop:
            return
        first = behind


def _units(data: bytes, start: int, unit: str) -> Iterator[Piece]:
    """The lines or paragraphs of a text, those that are not blank."""
    begin, at, first = None, start, start == 0
    for line in [*_lines(data), b""]:
        blank = not line.strip()
        if begin is not None and (blank or unit == "lines"):
            text, fault = _decoded(data[begin - start : at - start].rstrip(b"\r\n"), first=first)
            yield Piece(text, begin, at, fault=fault)
            begin, first = None, False
        if begin is None and not blank:
            begin = at
        at += len(line)


def _lines(data: bytes) -> list[bytes]:
    r"""Lines of bytes, each with the "\n" that ends it: nothing else ends one."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _decoded(data: bytes, first: bool) -> tuple[str | None, str]:
    try:
        return data.decode("utf-8-sig" if first else "utf-8"), ""
    except UnicodeDecodeError as error:
        return None, f"is not UTF-8 (byte {error.start} of it)"


def _is_text(found: str) -> bool:
    """Whether tokenizers can take it: by an escape, JSON may hold half of a surrogate pair."""
    try:
        found.encode()
    except UnicodeEncodeError:
        return False
    return True


def _between_letters(data: mmap.mmap, at: int) -> int:
    """The first place from `at` on where a letter of UTF-8 begins."""
    while at < len(data) and data[at] & 0xC0 == 0x80:
        at += 1
    return at
