"""Matrices of 4-bit codes as the kernels read them: where their codes and scales lie."""

from __future__ import annotations

import ctypes
from ctypes import c_int64

import torch
from torch import Tensor

from accessory.kernels.avx512.operands import address, whole
from accessory.kernels.codes import BLOCK, NESTED_BLOCK, Codes


class Packed(ctypes.Structure):
    """`Codes` in C: addresses, of tensors that whoever calls has to keep."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "table", "scales", "book", "nested_scales", "offset")),
        *((name, c_int64) for name in ("n", "k")),
    )


def takes(shape: tuple[int, int]) -> bool:
    """Whether W [n, k] is multiplied with: blocks of one row, and an even number of rows."""
    return min(shape) > 0 and shape[0] % 2 == 0 and shape[1] % BLOCK == 0


def packed(w: Codes) -> Packed:
    """Raises `AssertionError` for what a kernel does not take, or would not read as what it is."""
    (n, k), nested = w.shape, w.nested is not None
    blocks = n * k // BLOCK
    parts = {
        "codes": whole(w.codes, (n * k // 2,), "codes", torch.uint8),
        "table": whole(w.table, (16,), "table", torch.float32),
        "scales": whole(w.scales, (blocks,), "scales", torch.uint8 if nested else torch.float32),
    }
    if nested:
        shapes = (256,), (-(-blocks // NESTED_BLOCK),), (1,)
        for name, part, shape in zip(("book", "nested_scales", "offset"), w.nested, shapes, strict=True):
            parts[name] = whole(part, shape, name, torch.float32)
    if not all(part.is_contiguous() for part in (w.codes, w.table, w.scales, *(w.nested or ()))):
        raise AssertionError("codes and scales lie in one piece each")  # a copy would be gone before the call
    if not takes(w.shape):
        raise AssertionError(f"a matrix of {list(w.shape)}; expected even rows of whole blocks of {BLOCK}")
    return Packed(n=n, k=k, **{name: address(part) for name, part in parts.items()})


def plain(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """What stands beside a matrix, in fp32 and in one piece. Raises `AssertionError` for another shape or device."""
    return whole(tensor.to(torch.float32), shape, name, torch.float32)
