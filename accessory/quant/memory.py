"""The memory that matrices are unpacked into to be multiplied with at once: one piece, lent to one after the other.

On a CPU each matrix gets the part behind the last one's, and only when the piece is used up the first again. Written to
at once again, memory that all cores have just read must first be taken from their caches: where these are far apart, as
cores of two chiplets are, unpacking took 390 us instead of 90 (1536 x 576, two cores of an EPYC).
"""

from __future__ import annotations

import torch
from torch import Tensor

LENT_BEFORE_REUSE = 32 << 20  # bytes: more than what caches hold for long
MOST_TURNS = 16  # small matrices of which that would be many: no piece is larger than so many of the largest

_memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}
_used: dict[tuple[torch.device, torch.dtype], int] = {}


def shared_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any content; one that is asked for later may overlap it."""
    key, numel = (device, dtype), shape.numel()
    wanted = shared_bytes(numel * dtype.itemsize, device) // dtype.itemsize
    if key not in _memory or _memory[key].numel() < wanted:
        with torch.inference_mode(False):  # what is made in inference mode, training may not write into
            _memory[key] = torch.empty(wanted, dtype=dtype, device=device)
        _used[key] = 0
    begin = 0 if _used[key] + numel > _memory[key].numel() else _used[key]
    _used[key] = begin + numel if device.type == "cpu" else 0
    return _memory[key][begin : begin + numel].view(shape)


def shared_bytes(largest: int, device: torch.device) -> int:
    """Bytes of the whole piece, where the largest matrix has `largest`."""
    return min(MOST_TURNS * largest, max(LENT_BEFORE_REUSE, largest)) if device.type == "cpu" else largest
