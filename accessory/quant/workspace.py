"""The memory that matrices are unpacked into to be multiplied with at once: one piece, lent to one after the other.

On a CPU each matrix gets the part behind the last one's, and only when the piece is used up the first again. Written to
at once again, memory that all cores have just read must first be taken from their caches: where these are far apart, as
cores of two chiplets are, unpacking took 390 us instead of 90 (1536 x 576, two cores of an EPYC).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LENT_BEFORE_REUSE = 32 << 20  # bytes: more than what caches hold for long
MOST_TURNS = 16  # small matrices of which that would be many: no piece is larger than so many of the largest
ALIGNED = 64  # bytes that every part begins at a multiple of: a product's last bits may depend on it


@dataclass
class _Piece:
    memory: Tensor
    used: int = 0
    """Numbers that were lent since it was last begun from the front."""


_pieces: dict[tuple[torch.device, torch.dtype], _Piece] = {}


def shared_memory(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any content; one that is asked for later may overlap it."""
    numel, size = shape.numel(), shared_bytes(shape.numel() * dtype.itemsize, device) // dtype.itemsize
    piece = _pieces.get((device, dtype))
    if piece is None or piece.memory.numel() < size:
        with torch.inference_mode(False):  # what is made in inference mode, training may not write into
            piece = _pieces[device, dtype] = _Piece(torch.empty(size, dtype=dtype, device=device))
    begin = 0 if piece.used + numel > piece.memory.numel() else piece.used
    if device.type == "cpu":
        piece.used = begin + _aligned(numel * dtype.itemsize) // dtype.itemsize
    return piece.memory[begin : begin + numel].view(shape)


def shared_bytes(largest: int, device: torch.device) -> int:
    """Bytes of the whole piece, where the largest matrix has `largest`."""
    if device.type != "cpu":
        return largest
    return min(MOST_TURNS * _aligned(largest), max(LENT_BEFORE_REUSE, largest))


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
