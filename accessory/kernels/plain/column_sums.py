"""Sums over the rows of a matrix, in fp32 at least: a bias's gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def column_sums(x: Tensor) -> Tensor:
    """x [T, N] -> [N], fp32 however narrow x is."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
