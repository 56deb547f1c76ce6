"""Sums over the rows of a bf16 matrix, in fp32: a bias's gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled


def column_sums(x: Tensor) -> Tensor:
    """x [T, N] -> fp32 [N]."""
    x, out = x.contiguous(), torch.empty(x.shape[1])
    compiled("column_sums", "ppnnn")(x.data_ptr(), out.data_ptr(), *x.shape, torch.get_num_threads())
    return out
