"""The memory that matrices are unpacked into to be multiplied with at once: one piece, lent to one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

_memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def shared_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any content: a part of what the largest so far has needed. The next one asked for overlaps it."""
    key, numel = (device, dtype), shape.numel()
    if key not in _memory or _memory[key].numel() < numel:
        with torch.inference_mode(False):  # what is made in inference mode, training may not write into
            _memory[key] = torch.empty(numel, dtype=dtype, device=device)
    return _memory[key][:numel].view(shape)
