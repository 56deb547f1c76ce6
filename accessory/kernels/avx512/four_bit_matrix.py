"""Matrices of 4-bit codes as the kernels read them: where their codes and scales lie."""

from __future__ import annotations

import ctypes
from ctypes import c_int64

import torch
from torch import Tensor

from accessory.kernels.avx512.operands import CPU, address, whole
from accessory.kernels.codes import BLOCK, Codes


class Packed(ctypes.Structure):
    """`Codes` in C: addresses, of tensors that whoever calls has to keep."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "table", "scales", "book", "nested_scales", "offset")),
        *((name, c_int64) for name in ("n", "k")),
    )


def takes(*shapes: tuple[int, int]) -> bool:
    """Whether such W [n, k] are multiplied with: blocks of one row, and an even number of rows."""
    return all(min(shape) > 0 and shape[0] % 2 == 0 and shape[1] % BLOCK == 0 for shape in shapes)


def packed(w: Codes) -> Packed:
    """Raises `AssertionError` for what a kernel does not take, or would not read as what it is."""
    w.check(CPU)
    if not takes(w.shape):
        raise AssertionError(f"a matrix of {list(w.shape)}; expected even rows of whole blocks of {BLOCK}")
    parts = {"codes": w.codes, "table": w.table, "scales": w.scales}
    parts |= zip(("book", "nested_scales", "offset"), w.nested or (), strict=False)
    return Packed(n=w.shape[0], k=w.shape[1], **{name: address(part) for name, part in parts.items()})


def plain(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """What stands beside a matrix, in fp32 and in one piece. Raises `AssertionError` for another shape or device."""
    return whole(tensor.to(torch.float32), shape, name, torch.float32)
