"""Files of tokens: a safetensors file with one flat tensor, written bit by bit, and mapped to be read anywhere."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from accessory.data.raw.files import RawFile
from accessory.errors import DataError
from accessory.tokenizer import Tokenizer
from accessory.tokenizer.sniff import what_is

_FORMAT = "accessory-tokens-1"
_HEADER = 4096  # bytes reserved for the header, whose numbers are known only in the end
_LARGEST_HEADER = 1 << 20
_DTYPES = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4")}


@dataclass(frozen=True)
class PackedFile:
    """tokens: uint16 or uint32 [N], mapped: documents joined, each ended by `eos_id`."""

    file: RawFile
    tokens: np.ndarray
    eos_id: int
    tokenizer: str
    documents: int

    @classmethod
    def open(cls, file: RawFile, tokenizer: Tokenizer | None = None) -> Self:
        """Map a file. Raises `DataError` where it is none of these, breaks off, or is another `tokenizer`'s."""
        path = file.path
        try:
            with path.open("rb") as opened:
                length = int.from_bytes(opened.read(8), "little")
                header = json.loads(opened.read(length)) if 0 < length <= _LARGEST_HEADER else {}
            said, held = header["__metadata__"], header["tokens"]
            dtype, (count,) = _DTYPES[held["dtype"]], held["shape"]
            found = {name: int(said[name]) for name in ("eos_id", "documents")}
            if said["format"] != _FORMAT or type(count) is not int or count < 0:
                raise KeyError("format")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: found {what_is(path)}; expected tokens that tools/pack_data.py wrote.") from error
        if file.size != (expected := 8 + length + count * dtype.itemsize):
            raise DataError(f"{path}: has {file.size:,} bytes; its header says {expected:,}: it is not whole.")
        if tokenizer and said["tokenizer"] != tokenizer.fingerprint:
            raise DataError(
                f"{path}: its tokens are those of another tokenizer than --tokenizer_path gives ({tokenizer.source}); "
                "give that one, or write the file anew with this one (tools/pack_data.py)."
            )
        tokens = np.memmap(path, dtype, "r", 8 + length, (count,)) if count else np.empty(0, dtype)
        return cls(file, tokens, found["eos_id"], said["tokenizer"], found["documents"])

    def row(self, at: int, count: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [count], bool [count]: where a document begins) from token `at` on.

        Raises `DataError` for a token beyond the `rows` of the model's embedding.
        """
        tokens = self.tokens[at : at + count].astype(np.int32)
        if len(tokens) and (tokens.max() >= rows or tokens.min() < 0):
            place = int(np.argmax((tokens >= rows) | (tokens < 0)))
            raise DataError(f"{self.file.path}: token {at + place + 1:,} is {tokens[place]}; expected 0 to {rows - 1}.")
        starts = np.zeros(count, dtype=bool)
        starts[1:] = tokens[:-1] == self.eos_id
        return tokens, starts


class PackedWriter:
    """Writes a file of tokens, as a context; it appears whole at the end, or not at all."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        self.path, self.tokenizer = path, tokenizer
        self.partial = path.with_name(f".{path.name}.{os.getpid()}")
        self.dtype = "U16" if tokenizer.vocab_size <= 1 << 16 else "U32"
        self.count = self.documents = 0

    def __enter__(self) -> Self:
        self._file: BinaryIO = self.partial.open("wb")
        self._file.write(bytes(8 + _HEADER))
        return self

    def write(self, tokens: np.ndarray, documents: int) -> None:
        """Append tokens [N] of so many documents, which are whole."""
        self._file.write(np.ascontiguousarray(tokens, dtype=_DTYPES[self.dtype]))
        self.count, self.documents = self.count + len(tokens), self.documents + documents

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                size = self.count * _DTYPES[self.dtype].itemsize
                said = {
                    "format": _FORMAT, "tokenizer": self.tokenizer.fingerprint, "eos_id": str(self.tokenizer.eos_id),
                    "vocab_size": str(self.tokenizer.vocab_size), "documents": str(self.documents),
                }  # fmt: skip
                tokens = {"dtype": self.dtype, "shape": [self.count], "data_offsets": [0, size]}
                header = json.dumps({"__metadata__": said, "tokens": tokens}).encode().ljust(_HEADER)
                self._file.seek(0)
                self._file.write(_HEADER.to_bytes(8, "little") + header)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                self.partial.replace(self.path)
        finally:
            self.partial.unlink(missing_ok=True)
