"""Matrices of 4-bit codes as the kernels read them: where their codes and scales lie."""

from __future__ import annotations

import ctypes
from ctypes import c_int64

from accessory.kernels.codes import BLOCK, Codes
from accessory.kernels.operands import CPU, address

NESTED = ("nested_codebook", "nested_scales", "offset")


class Packed(ctypes.Structure):
    """`Codes` in C: addresses of tensors, which the caller has to keep alive."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "codebook", "scales", *NESTED)),
        *((name, c_int64) for name in ("n", "k")),
    )


def takes(*shapes: tuple[int, int]) -> bool:
    """Whether the kernels take such W [n, k]: even numbers of rows of whole blocks."""
    return all(min(shape) > 0 and shape[0] % 2 == 0 and shape[1] % BLOCK == 0 for shape in shapes)


def packed(w: Codes) -> Packed:
    """`w` for a kernel. Raises `AssertionError` for a wrong shape, dtype or place in memory."""
    w.check(CPU)
    if not takes(w.shape):
        raise AssertionError(f"a matrix of {list(w.shape)}; expected even rows of whole blocks of {BLOCK}")
    parts = {"codes": w.codes, "codebook": w.codebook, "scales": w.scales}
    parts |= zip(NESTED, w.nested or (), strict=False)
    return Packed(n=w.shape[0], k=w.shape[1], **{name: address(part) for name, part in parts.items()})
