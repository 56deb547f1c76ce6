"""GPTQ (Frantar et al. 2022): columns are rounded one by one, and those that follow make up for each one's error.

With H = X^T X of a linear's inputs, an error e in column k is made up for best, over the columns after it, by taking
e / U[k, k] * U[k, j] from each column j, where U is the upper Cholesky factor of H's inverse.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accessory.errors import CheckpointError
from accessory.quantizer.grid import Grid, fit, fit_whole, pieces

DAMPING = 0.01
"""Of the mean of H's diagonal, added to it: text has fewer directions than a matrix has columns."""
_COLUMNS = 64
"""Columns whose errors reach those after them in one product. A group begins where they do, or lies among them."""
_BEYOND = 0.49  # a code that lay further outside the range would never get a gradient


class Curvature(NamedTuple):
    """Of a damped H: `factor`, the upper triangular U [K, K] with U^T U = H^-1, and H's diagonal `importance` [K]."""

    factor: Tensor
    importance: Tensor


def curvature(hessian: Tensor) -> Curvature:
    """Of a damped H [K, K], whose memory the factor takes."""
    importance, columns = hessian.diagonal().clone(), hessian.t()  # as LAPACK has it: without copies
    torch.linalg.cholesky(columns, out=columns)
    torch.cholesky_inverse(columns, out=columns)
    return Curvature(torch.linalg.cholesky(columns, upper=True, out=columns), importance)


def gptq(weight: Tensor, of_inputs: Curvature, bits: int, group: int, *, whole: bool = False) -> tuple[Grid, float]:
    """W [N, K] -> (codes, scales and zeros, the sum of squares of the outputs' errors); each row is by itself.

    The codes are what the columns were rounded from when their turn came, at most 0.49 beyond the range: reconstruction
    trains them from there, and moves those first that lay near another whole number.

    A group's scale and zero are fitted when its first column's turn comes, to the weights as errors before it have
    changed them. group: a divisor or a multiple of 64. whole: zeros are whole multiples of the scales.
    """
    (factor, importance), fitted = of_inputs, fit_whole if whole else fit
    (rows, columns), top, lost = weight.shape, 2**bits - 1, 0.0
    w = weight.float().t().contiguous()  # columns lie along memory
    codes = torch.empty_like(w)
    statistics = w.new_empty(2, -(-columns // group), rows)
    for start in range(0, columns, _COLUMNS):
        stop = min(start + _COLUMNS, columns)
        errors = w.new_empty(stop - start, rows)
        for k in range(start, stop):
            if k % group == 0:
                own = slice(k, min(k + group, columns))
                statistics[:, k // group] = torch.stack(fitted(w[own], importance[own], top))
            scale, zero = statistics[:, k // group]
            torch.div(w[k] + zero, scale, out=codes[k]).clamp_(-_BEYOND, top + _BEYOND)
            error = errors[k - start]
            torch.sub(w[k], codes[k].round() * scale - zero, out=error).div_(factor[k, k])
            w[k + 1 : stop].addr_(factor[k, k + 1 : stop], error, alpha=-1)
        w[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
        lost += float(errors.square_().sum())
    del w
    scales, zeros = (statistic.t().contiguous() for statistic in statistics)
    points = (zeros / scales).round_() if whole else None
    return Grid(codes.t().contiguous(), scales, zeros, bits, group, points), lost


def damp_(hessian: Tensor) -> Tensor:
    """Add `DAMPING` times the mean of its diagonal to the diagonal of H, in place; returns H.

    Raises `CheckpointError` for an H that is not finite, or zero.
    """
    mean = hessian.diagonal().mean()
    if not (mean.isfinite() and mean > 0):
        raise CheckpointError(f"The inputs of a linear have a sum of squares of {float(mean)}; expected finite ones.")
    hessian.diagonal().add_(DAMPING * mean)
    return hessian


def output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """dW [N, K], H [K, K] -> [N]: for each row dW H dW^T, the sum over inputs of the squared error of its output."""
    parts = (difference[part].float() for part in pieces(*difference.shape))
    return torch.cat([(part @ hessian * part).sum(1) for part in parts])
