"""Matrices of 2, 3 and 4-bit codes in groups, unpacked into bf16."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.avx512.group_codes_matrix import in_c, takes
from accessory.kernels.codes import GroupCodes
from accessory.kernels.operands import address, check_numbers, check_shape
from accessory.kernels.plain import group_codes as plain


def dequantize(w: GroupCodes, out: Tensor) -> Tensor:
    """Fill `out` bf16 [n, k], contiguous, with W; returns it. The same bits as plain PyTorch's.

    Raises `AssertionError` for what does not fit together.
    """
    if not takes(w):
        return plain.dequantize(w, out)
    check_numbers(out, "out")
    check_shape(out, w.shape, "out")
    if not out.is_contiguous():
        raise AssertionError(f"out has strides {out.stride()}; expected contiguous rows")
    compiled("group_codes_dequantize", "ppn")(byref(in_c(w)), address(out), torch.get_num_threads())
    return out


def workspace_bytes(shape: tuple[int, int], device: torch.device, *, ordered: bool) -> int:
    """Bytes that `dequantize` works in at most: those of plain PyTorch, which some matrices are left to."""
    return plain.workspace_bytes(shape, device, ordered=ordered)
