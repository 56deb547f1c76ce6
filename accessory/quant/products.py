"""Products with matrices that lie plain or packed, and the low-rank products and biases beside them.

What is small is made first and the base's product added to it, or most of a young LoRA is lost in bf16: a result that
is rounded already does not move when something below half its last digit comes to it; a sum that is rounded once does.
(peft adds to the rounded result; ten steps on SmolLM2-135M ended 7 % from the losses of fp32.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.quant.packed import LowRankTerm, PackedWeight

Matrix = Tensor | PackedWeight


def multiply(x: Tensor, matrix: Matrix, bias: Tensor | None = None, low: LowRankTerm | None = None) -> Tensor:
    """x [T, K] -> x W^T + bias + low's [T, N], in x's dtype. W [N, K] packed, or plain and cast for this use."""
    fused = _fused([x], [matrix], turned=False, bias=bias, low=low)
    if fused is not None:
        return fused
    bias = None if bias is None else bias.to(x.dtype)
    if low is None:
        return F.linear(x, _borrowed(matrix, x), bias)
    factor = low.factor.to(x.dtype).t()
    beside = (low.x @ factor).mul_(low.scale) if bias is None else torch.addmm(bias, low.x, factor, alpha=low.scale)
    return beside.addmm_(x, _borrowed(matrix, x).t())


def sum_of_turned_products(dys: list[Tensor], matrices: list[Matrix], low: LowRankTerm | None = None) -> Tensor:
    """Each dy [T, N] times its W [N, K], summed, and low's -> [T, K] in their dtype."""
    fused = _fused(dys, matrices, turned=True, bias=None, low=low)
    if fused is not None:
        return fused
    dx = None if low is None else (low.x @ low.factor.to(low.x.dtype)).mul_(low.scale)
    for dy, matrix in zip(dys, matrices, strict=True):
        w = _borrowed(matrix, dy)
        dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx


def _fused(factors: list[Tensor], matrices: list[Matrix], **more: object) -> Tensor | None:
    kind = type(matrices[0])
    if not issubclass(kind, PackedWeight) or any(type(matrix) is not kind for matrix in matrices):
        return None
    return kind.fused_sum(factors, matrices, **more)


def _borrowed(matrix: Matrix, like: Tensor) -> Tensor:
    return matrix.borrow(like.dtype) if isinstance(matrix, PackedWeight) else matrix.to(like.dtype)
