"""Counts documents of raw text that cannot be used, and names them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from accessory.data.raw.documents import Piece
from accessory.data.raw.files import RawFile
from accessory.errors import DataError

_FEW = 100  # documents of which the share that cannot be used says nothing yet
_COUNTED = 1 << 30  # bytes in which lines are counted
_TOLD = 5  # documents that cannot be used are named


@dataclass
class Skipped:
    """Counts a rank's documents that cannot be used. most: the largest share there may be. tell: is told the first."""

    most: float
    tell: Callable[[str], None]
    read: int = 0
    faults: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, file: RawFile, pieces: list[Piece]) -> None:
        """Note the documents of a part of a file. Raises `DataError` if too many of those so far cannot be used."""
        with self._lock:
            self.read += len(pieces)
        for piece in (piece for piece in pieces if piece.text is None):
            with self._lock:
                self.faults += 1
                faults, read = self.faults, self.read
            if faults > self.most * max(read, _FEW):
                raise DataError(
                    f"{_named(file, piece)}. {faults:,} of {read:,} documents so far cannot be used; --max_skipped "
                    f"{self.most:g} allows no more."
                )
            if faults <= _TOLD:
                more = ", and so are others, unnamed" if faults == _TOLD else ""
                self.tell(f"{_named(file, piece)}: it is left out{more}")


def _named(file: RawFile, piece: Piece) -> str:
    return f"{place_of(file, piece.at)}: {piece.fault}"


def place_of(file: RawFile, at: int) -> str:
    """A place as messages name it: `file:line`, or the row of a Parquet file, or the token of a packed one.

    Far into a large file it is the byte: lines would have to be counted from the file's start.
    """
    if file.kind in ("parquet", "packed"):
        return f"{file.path}: {'row' if file.kind == 'parquet' else 'token'} {at + 1:,}"
    if at > _COUNTED:
        return f"{file.path}: byte {at:,}"
    line, left = 1, at
    with file.path.open("rb") as opened:
        while left and (data := opened.read(min(left, 1 << 20))):
            line, left = line + data.count(b"\n"), left - len(data)
    return f"{file.path}:{line}"
