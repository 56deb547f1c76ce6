"""Products with matrices that lie plain or packed, and the low-rank products and biases beside them."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from accessory.quant.packed import LowRankTerm, PackedWeight

Matrix = Tensor | PackedWeight


def multiply(x: Tensor, matrix: Matrix, bias: Tensor | None = None, low: LowRankTerm | None = None) -> Tensor:
    """x [T, K] -> x W^T + bias + low's [T, N], in x's dtype. W [N, K] packed, or plain and cast for this use."""
    fused = _fused([x], [matrix], turned=False, bias=bias, low=low)
    if fused is not None:
        return fused
    y = F.linear(x, _borrowed(matrix, x), None if bias is None else bias.to(x.dtype))
    return y if low is None else y.addmm_(low.x, low.factor.to(x.dtype).t(), alpha=low.scale)


def sum_of_turned_products(dys: list[Tensor], matrices: list[Matrix], low: LowRankTerm | None = None) -> Tensor:
    """Each dy [T, N] times its W [N, K], summed, and low's -> [T, K] in their dtype."""
    fused = _fused(dys, matrices, turned=True, bias=None, low=low)
    if fused is not None:
        return fused
    dx = None
    for dy, matrix in zip(dys, matrices, strict=True):
        w = _borrowed(matrix, dy)
        dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx if low is None else dx.addmm_(low.x, low.factor.to(dx.dtype), alpha=low.scale)


def _fused(factors: list[Tensor], matrices: list[Matrix], **more: object) -> Tensor | None:
    kind = type(matrices[0])
    if not issubclass(kind, PackedWeight) or any(type(matrix) is not kind for matrix in matrices):
        return None
    return kind.fused_sum(factors, matrices, **more)


def _borrowed(matrix: Matrix, like: Tensor) -> Tensor:
    return matrix.borrow(like.dtype) if isinstance(matrix, PackedWeight) else matrix.to(like.dtype)
