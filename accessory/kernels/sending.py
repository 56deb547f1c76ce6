"""From the host to the device."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`. To a GPU it goes through page-locked memory, so that the host need not wait.

    From any other memory, the host would wait until the GPU has done all that was asked of it before.
    """
    if tensor.is_cpu and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
