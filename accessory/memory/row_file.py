"""Rows of documents in a directory: written once by document, read in any order by every process of the machine.

`rows` holds the documents in the corpus' order, each with the rows of its tokens in the first state, then in the
second, and so on. `written` has a byte for each document, 1 once its rows have reached the disk, so that a crash leaves
no document that looks whole and is not. `cache.json` is the identity of all that the rows follow from.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from math import gcd
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from accessory.checkpoint.disk_space import disk_fault
from accessory.checkpoint.source import read_json
from accessory.errors import CheckpointError, ConfigError, is_file
from accessory.parallel.agree import differences

IDENTITY_FILE, ROWS_FILE, WRITTEN_FILE = "cache.json", "rows", "written"
BLOCK = 64
"""Channels of an 8-bit row that share a scale: some channels of a state are a thousand times as large as others."""
LARGEST = 127  # code


class Span(NamedTuple):
    """Rows from `start` on of a document's `length`."""

    document: int
    start: int
    length: int


class Exact:
    """Rows [n, width] as they are."""

    name: ClassVar[str] = "exact"

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype, self.row_bytes = width, dtype, width * dtype.itemsize

    def pack(self, rows: Tensor) -> Tensor:
        """rows [n, width] -> uint8 [n, row_bytes], on their device."""
        return rows.contiguous().view(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return packed.view(self.dtype)


class EightBits(Exact):
    """Rows as codes from -127 to 127, with a bf16 scale for each `BLOCK` channels."""

    name = "int8"

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__(width, dtype)
        self.block = gcd(width, BLOCK)
        self.row_bytes = width + 2 * width // self.block

    def pack(self, rows: Tensor) -> Tensor:
        """rows [n, width] -> uint8 [n, row_bytes]: codes, then scales."""
        blocks = rows.float().unflatten(1, (-1, self.block))
        scales = (blocks.abs().amax(-1) / LARGEST).to(torch.bfloat16)
        steps = scales.float().clamp_min(torch.finfo(torch.bfloat16).tiny)[..., None]
        codes = (blocks / steps).round_().clamp_(-LARGEST, LARGEST).to(torch.int8).flatten(1)
        return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)], 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 [n, row_bytes] -> [n, width] in the dtype."""
        codes = packed[:, : self.width].view(torch.int8).unflatten(1, (-1, self.block))
        scales = packed[:, self.width :].contiguous().view(torch.bfloat16)
        return (codes * scales.float()[..., None]).flatten(1).to(self.dtype)


ROWS = {kind.name: kind for kind in (Exact, EightBits)}
"""Values of `--cache_base_rows`."""


class RowFile:
    """Packed rows of each state for every document of a corpus, in `directory`.

    offsets: int64 [documents + 1], as `Corpus.offsets`. states: how the rows of each are packed. identity: JSON of all
    that they follow from.
    """

    def __init__(self, directory: Path, offsets: np.ndarray, states: Sequence[Exact], identity: dict[str, Any]) -> None:
        self.directory, self.offsets, self.states, self.identity = directory, offsets, tuple(states), identity
        self.token_bytes = sum(state.row_bytes for state in self.states)
        self.written = np.zeros(len(offsets) - 1, dtype=bool)
        self._pending: list[int] = []
        self._rows = self._marks = -1

    @property
    def total_bytes(self) -> int:
        """Of all rows."""
        return int(self.offsets[-1]) * self.token_bytes

    @property
    def missing_bytes(self) -> int:
        """Of the rows that are not there yet."""
        return int(np.diff(self.offsets)[~self.written].sum()) * self.token_bytes

    def look(self) -> None:
        """Find out which documents are there; nothing is changed.

        Raises `ConfigError` naming what differs where the directory holds rows of something else, `CheckpointError`
        where they are damaged.
        """
        path = self.directory / IDENTITY_FILE
        if not is_file(path):
            return
        found = differences("", read_json(path), self.identity)
        if found:
            said = "; ".join(f"{name.lstrip('.')} was {was!r}, is {now!r}" for name, was, now in found)
            raise ConfigError(
                f"--cache_base {self.directory}: holds what another base gave, or gave for other data: {said}. Give "
                "another directory, or remove this one."
            )
        for name, size in self._sizes().items():
            file = self.directory / name
            if not is_file(file) or file.stat().st_size != size:
                raise CheckpointError(f"{file}: is damaged; expected {size:,} bytes. Remove {self.directory}.")
        self._note(np.fromfile(self.directory / WRITTEN_FILE, np.uint8))

    def open(self) -> None:
        """Open the files, made where they are not there. Raises `ConfigError` where that cannot be."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            handles = {}
            for name, size in self._sizes().items():
                handles[name] = os.open(self.directory / name, os.O_RDWR | os.O_CREAT, 0o666)
                os.ftruncate(handles[name], size)
            self._rows, self._marks = handles[ROWS_FILE], handles[WRITTEN_FILE]
            if not (self.directory / IDENTITY_FILE).is_file():
                self._write_identity()
        except OSError as error:
            raise ConfigError(f"--cache_base {self.directory}: cannot be written to ({error.strerror}).") from error
        self.refresh()

    def close(self) -> None:
        """Close the files. What was not settled is forgotten."""
        for handle in (self._rows, self._marks):
            if handle >= 0:
                os.close(handle)
        self._rows = self._marks = -1

    def has(self, documents: Iterable[int]) -> bool:
        """Whether the rows of all of them were there at the last `refresh`."""
        return all(self.written[document] for document in documents)

    def write(self, state: int, document: int, packed: Tensor) -> None:
        """A document's packed rows of one state, uint8 [S, row_bytes] on the CPU. Raises `DiskFullError`."""
        data = memoryview(packed.contiguous().flatten().numpy())
        self._guarded(_write_all, self._rows, data, self._place(state, Span(document, 0, len(packed))))

    def add(self, documents: Iterable[int]) -> None:
        """All rows of these are written, and will count from the next `settle` on."""
        self._pending += documents

    def settle(self) -> None:
        """Have the rows reach the disk, and then the word that they did. Raises `DiskFullError`."""
        if not self._pending:
            return
        self._guarded(os.fdatasync, self._rows)
        for document in self._pending:
            self._guarded(os.pwrite, self._marks, b"\1", document)
        self._guarded(os.fdatasync, self._marks)
        self._pending = []

    def refresh(self) -> None:
        """Learn what other processes have settled."""
        self._note(np.frombuffer(os.pread(self._marks, len(self.written), 0), np.uint8))

    def read(self, state: int, spans: Sequence[Span]) -> Tensor:
        """Rows of one state, of several documents end to end: [T, width]."""
        kind = self.states[state]
        packed = torch.empty(sum(span.length for span in spans), kind.row_bytes, dtype=torch.uint8)
        target, end = memoryview(packed.flatten().numpy()), 0
        for span in spans:
            begin, end = end, end + span.length * kind.row_bytes
            _read_all(self._rows, target[begin:end], self._place(state, span))
        return kind.unpack(packed)

    def will_need(self, documents: Iterable[int]) -> None:
        """Have the system read these documents' rows into its cache; it goes on by itself."""
        for document in documents:
            begin, end = (int(offset) * self.token_bytes for offset in self.offsets[document : document + 2])
            os.posix_fadvise(self._rows, begin, end - begin, os.POSIX_FADV_WILLNEED)

    def _place(self, state: int, span: Span) -> int:
        """Where a span's first row of one state begins in the file."""
        begin, end = (int(offset) for offset in self.offsets[span.document : span.document + 2])
        before = sum(kind.row_bytes for kind in self.states[:state])
        return begin * self.token_bytes + (end - begin) * before + span.start * self.states[state].row_bytes

    def _sizes(self) -> dict[str, int]:
        return {ROWS_FILE: self.total_bytes, WRITTEN_FILE: len(self.written)}

    def _note(self, marks: np.ndarray) -> None:
        self.written = marks.astype(bool)

    def _write_identity(self) -> None:
        """After the other files, so that they are there wherever it is; processes may do so at the same time."""
        with tempfile.NamedTemporaryFile("w", dir=self.directory, delete=False, encoding="utf-8") as file:
            json.dump(self.identity, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.directory / IDENTITY_FILE)

    def _guarded(self, work: Callable[..., object], *given: object) -> None:
        try:
            work(*given)
        except OSError as error:
            raise disk_fault(self.directory / ROWS_FILE, error) from error


def _write_all(handle: int, data: memoryview, place: int) -> None:
    while data:
        done = os.pwrite(handle, data, place)
        data, place = data[done:], place + done


def _read_all(handle: int, target: memoryview, place: int) -> None:
    while target:
        done = os.preadv(handle, [target], place)
        if not done:
            raise CheckpointError(f"the rows of --cache_base end at {place:,}: another process has cut them short.")
        target, place = target[done:], place + done
