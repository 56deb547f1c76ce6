"""The buffer that matrices are unpacked into, each for one product: all matrices use it one after the other.

On a CPU each matrix gets the part after the last one's, and the first part again when the buffer is used up. Writing at
once to memory that all cores have just read must first evict it from their caches: on two chiplets of an EPYC that
made unpacking take 390 us instead of 90 (1536 x 576, two cores).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REUSE_DISTANCE = 32 << 20  # bytes between two uses of the same memory: more than caches hold for long
MOST_SLOTS = 16  # a buffer holds no more matrices of the largest size, for small ones
ALIGNED = 64  # bytes that every part begins at a multiple of: a product's last bits may depend on it


@dataclass
class _Piece:
    memory: Tensor
    used: int = 0
    """Numbers of it that were used since its beginning was."""


_pieces: dict[tuple[torch.device, torch.dtype], _Piece] = {}


def unpack_buffer(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialized tensor in the buffer; later ones may overlap it."""
    numel, size = shape.numel(), unpack_buffer_bytes(shape.numel() * dtype.itemsize, device) // dtype.itemsize
    piece = _pieces.get((device, dtype))
    if piece is None or piece.memory.numel() < size:
        with torch.inference_mode(False):  # training may not write into tensors of inference mode
            piece = _pieces[device, dtype] = _Piece(torch.empty(size, dtype=dtype, device=device))
    begin = 0 if piece.used + numel > piece.memory.numel() else piece.used
    if device.type == "cpu":
        piece.used = begin + _aligned(numel * dtype.itemsize) // dtype.itemsize
    return piece.memory[begin : begin + numel].view(shape)


def forget(device: torch.device) -> None:
    """Free the buffers on `device`; the next matrix gets a new one."""
    for key in [key for key in _pieces if key[0] == device]:
        del _pieces[key]


def memory_in_use() -> list[Tensor]:
    """The memory of all buffers. Recorded work writes there, so it holds this when larger buffers replace them."""
    return [piece.memory for piece in _pieces.values()]


def unpack_buffer_bytes(largest: int, device: torch.device) -> int:
    """Bytes of the buffer, if the largest matrix has `largest`."""
    if device.type != "cpu":
        return largest
    return min(MOST_SLOTS * _aligned(largest), max(REUSE_DISTANCE, largest))


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
