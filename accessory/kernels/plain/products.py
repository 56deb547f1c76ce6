"""Sums of products with matrices in any float dtype, of a bias and of a product of low rank.

Small terms are computed first and the rest is added to them: in bf16, a result that is rounded already does not change
when less than half its last digit is added, and most of a new LoRA would be lost. (peft adds to the rounded result; ten
steps on SmolLM2-135M ended 7 % from the losses of fp32.)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def sum_of_products(
    factors: list[Tensor],
    weights: Iterable[Tensor],
    *,
    transposed: bool,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Sum over the matrices of a W^T [T, n], or of a W [T, k] if `transposed`, in the factors' dtype.

    factors: the a [T, k], or [T, n]. weights: each is taken when the one before has been multiplied with. bias: one
    more summand, [n], or [k]. low: (x [T, R], factor [n, R], or [R, k], scale): x times scale * factor^T, or
    scale * factor, is another.
    """
    # Added to a large bias, some of LoRA is lost; a small bias added to the rounded sum would lose all its training.
    y = None if bias is None else bias.to(factors[0].dtype)
    if low is not None:
        x, factor, scale = low
        factor = factor.to(x.dtype) if transposed else factor.to(x.dtype).t()
        if y is not None:
            y = torch.addmm(y, x, factor, alpha=scale)
        else:
            y = x @ factor if scale == 1 else (x @ factor).mul_(scale)
    for a, w in zip(factors, weights, strict=True):
        w = (w if transposed else w.t()).to(a.dtype)
        y = a @ w if y is None else y.addmm_(a, w) if y.dim() == 2 else torch.addmm(y, a, w)
    return y
