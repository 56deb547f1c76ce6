"""Numbers that the host reads from the device when it needs them, without waiting for later work there."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """The numbers of a tensor [n] as they are now; from a GPU, a copy to page-locked memory begins at once."""

    def __init__(self, values: Tensor) -> None:
        self._there = None
        self._values = values.to("cpu", non_blocking=True) if values.is_cuda else values.clone()
        if values.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[float]:
        """Wait for the copy, and return the numbers."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()
