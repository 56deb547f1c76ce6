"""Numbers of the device that the host reads when it needs them, without waiting for what was asked of it meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


class Later:
    """The numbers of a tensor [n] as they are now; a GPU's are on their way to page-locked memory from now on."""

    def __init__(self, values: Tensor) -> None:
        self._there = None
        self._values = values.to("cpu", non_blocking=True) if values.is_cuda else values.clone()
        if values.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record()

    def read(self) -> list[float]:
        """Wait until they are there."""
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()
