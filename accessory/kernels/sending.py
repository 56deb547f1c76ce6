"""Copies from the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`. Page-locked memory is used for a GPU, so that the host need not wait.

    With any other memory, the host would wait until the GPU has done all earlier work.
    """
    if tensor.is_cpu and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
