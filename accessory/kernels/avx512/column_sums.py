"""Sums over the rows of a bf16 matrix, in fp32: a bias's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.operands import address, contiguous, made


def column_sums(x: Tensor) -> Tensor:
    """x bf16 [T, N] -> fp32 [N]. Raises `AssertionError` for another x."""
    rows, width = x.shape
    x, out = contiguous(x, (rows, width), "x"), made((width,), torch.float32)
    compiled("column_sums", "ppnnn")(address(x), address(out), rows, width, torch.get_num_threads())
    return out
