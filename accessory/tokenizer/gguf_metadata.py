"""The key-value head of a GGUF file, without its tensors.

The `gguf` package makes several array objects of each string, which takes four seconds for a vocabulary of 49,152;
walking the same bytes takes a twentieth of a second. The format is specified in the ggml repository (docs/gguf.md).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from accessory.errors import TokenizerError
from accessory.tokenizer.sniff import what_is

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)


def read_metadata(path: Path) -> dict[str, object]:
    """All keys of the file: numbers, booleans, strings, and lists of them.

    Raises TokenizerError for a file that is not GGUF of version 2 or 3 (little-endian), or is cut short.
    """
    expected = "expected a GGUF file (version 2 or 3), whole and undamaged"
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return MetadataWalk(buffer).metadata()
    except (OSError, ValueError, struct.error, KeyError, RecursionError) as error:
        raise TokenizerError(f"{path}: found {what_is(path)}; {expected} ({error}).") from error


class MetadataWalk:
    """A position in the bytes of the file, moved on by each read."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer, self._at = buffer, 0

    def metadata(self) -> dict[str, object]:
        """The header's keys and values. Raises `ValueError` where the bytes are no GGUF file of a version we know."""
        magic, version, _tensors, keys = self._unpack("<4sIQQ")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"it begins with {magic!r}, version {version}")
        return {self._string(): self._value(self._unpack("<I")[0]) for _ in range(keys)}

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._unpack("<IQ")
            return self._array(inner, count)
        return self._unpack("<" + _SCALARS[kind])[0]

    def _array(self, kind: int, count: int) -> list:
        # A damaged count could ask for any number of objects.
        if count > len(self._buffer) - self._at:
            raise ValueError(f"a list of {count} values passes the end of the file")
        if kind in _SCALARS:
            return list(self._unpack(f"<{count}{_SCALARS[kind]}"))
        return [self._value(kind) for _ in range(count)]

    def _string(self) -> str:
        (size,) = self._unpack("<Q")
        start, self._at = self._at, self._at + size
        if self._at > len(self._buffer):
            raise ValueError(f"a text of {size} bytes passes the end of the file")
        return self._buffer[start : self._at].decode("utf-8")

    def _unpack(self, layout: str) -> tuple:
        values = struct.unpack_from(layout, self._buffer, self._at)
        self._at += struct.calcsize(layout)
        return values
