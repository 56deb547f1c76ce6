"""Matrices of 2, 3 and 4-bit codes in groups as the kernels read them: where their parts lie."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch

from accessory.kernels.codes import GroupCodes
from accessory.kernels.operands import CPU, address

PIECE = 32
"""Columns that are unpacked at once: those of a group or less."""
_PARTS = ("codes", "high", "scales", "zeros", "points")


class InC(ctypes.Structure):
    """`GroupCodes` in C: addresses of tensors, which the caller has to keep alive."""

    _fields_ = (
        *((name, c_void_p) for name in _PARTS),
        *((name, c_int64) for name in ("n", "k", "bits", "group", "wide")),
    )


def takes(*matrices: GroupCodes) -> bool:
    """Whether the kernels take such W [n, k]: whole groups by powers of two, columns in the order of x's channels."""
    return all(
        min(w.shape) > 0
        and w.group % PIECE == 0
        and w.group & (w.group - 1) == 0
        and all(part is None for part in (w.order, w.channel_scale, w.groups))
        for w in matrices
    )


def in_c(w: GroupCodes) -> InC:
    """`w` for a kernel. Raises `AssertionError` for a wrong shape, dtype or place in memory."""
    w.check(CPU)
    if not takes(w):
        raise AssertionError(
            f"a matrix of {list(w.shape)} in groups of {w.group}, order {w.order is not None}, channel_scale "
            f"{w.channel_scale is not None}, groups {w.groups is not None}; expected groups of a power of two from "
            f"{PIECE} on, and none of these"
        )
    parts = {name: address(getattr(w, name)) for name in _PARTS}
    return InC(n=w.shape[0], k=w.shape[1], bits=w.bits, group=w.group, wide=w.scales.dtype == torch.float32, **parts)
