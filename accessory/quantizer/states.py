"""Hidden states of the calibration rows between two blocks, in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class States:
    """Hidden states [R, S, D] in `dtype`, of which some rows at a time are in memory."""

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self._bytes = shape[1] * shape[2] * dtype.itemsize

    def read(self, rows: Sequence[int]) -> Tensor:
        """The states [len(rows) * S, D] of some rows, in their order, on the CPU."""
        found = torch.empty(len(rows), self._bytes, dtype=torch.uint8)
        with self.path.open("rb", buffering=0) as file:
            for row, place in zip(rows, found.numpy(), strict=True):
                file.seek(row * self._bytes)
                file.readinto(memoryview(place))
        return found.view(self.dtype).view(-1, self.shape[2])

    def write(self, batches: Iterator[Tensor]) -> None:
        """Replace all: batches [T, D] of all rows in order."""
        with self.path.open("wb") as file:
            for batch in batches:
                file.write(_bytes_of(batch.to("cpu", self.dtype)))


def _bytes_of(values: Tensor) -> memoryview:
    return memoryview(np.ascontiguousarray(values.contiguous().view(-1).view(torch.uint8).numpy()))
