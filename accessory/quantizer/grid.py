"""Scale, zero and whole numbers of groups of weights, by least squares in which each column has its own weight."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Parts of a group's range, below its mean and above it, that are tried first, each with each."""
TURNS = 6
"""How often statistics and codes are taken in turn."""
LEAST_SCALE = 1e-7  # the smallest that fp16 has without losing most digits


class Grid(NamedTuple):
    """W [N, K] is about codes * scales - zeros: codes [N, K], whole numbers or near them; scales, zeros [N, G], fp32.

    Column k belongs to group k // group; the last group may have fewer columns. Codes are from 0 to 2^bits - 1.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def rounded(self) -> Grid:
        """Codes rounded to whole numbers of the range, and statistics to what fp16 holds."""
        codes = self.codes.round().clamp_(0, self.top)
        return self._replace(codes=codes, scales=self.scales.half().float(), zeros=self.zeros.half().float())

    def weights(self) -> Tensor:
        """The matrix [N, K], fp32, of codes as they are."""
        return on_grid(self.codes, self.scales, self.zeros, self.group)


def on_grid(codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> Tensor:
    """codes [N, K] * scales - zeros [N, G] -> [N, K] in the codes' dtype."""
    columns = codes.shape[1]
    return torch.addcmul(-spread(zeros, group, columns), codes, spread(scales, group, columns))


def spread(statistics: Tensor, group: int, columns: int) -> Tensor:
    """[N, G] -> [N, columns]: each number repeated for the columns of its group."""
    return statistics.repeat_interleave(group, 1)[:, :columns]


def fit(w: Tensor, importance: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Groups w [C, M] fp32, a column each -> (scale [M], zero [M]), as fp16 holds them.

    They make the sum over a group of importance [C] times squared error small: the best of some clipped ranges, then
    least squares for these codes and the nearest codes for those in turn.
    """
    h = importance[:, None] / importance.sum()
    mean = w.mean(0)
    below, above = w.amin(0) - mean, w.amax(0) - mean
    best = (torch.full_like(mean, float("inf")), torch.ones_like(mean), torch.zeros_like(mean))
    for low, high in product(CLIPS, CLIPS):
        scale = ((above * high - below * low) / top).clamp_min(LEAST_SCALE)
        best = _better(best, w, h, scale, -(mean + below * low), top)
    for _ in range(TURNS):
        _, scale, zero = best
        codes = nearest(w, scale, zero, top)
        of_codes, of_weights = (codes * h).sum(0), (w * h).sum(0)
        apart = codes - of_codes
        steps = (apart * w * h).sum(0) / (apart.square() * h).sum(0).clamp_min(1e-12)
        scale = torch.where(steps > LEAST_SCALE, steps, scale)
        best = _better(best, w, h, scale, scale * of_codes - of_weights, top)
    return best[1], best[2]


def nearest(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The codes from 0 to `top`, fp32, whose values code * scale - zero are nearest to w."""
    return ((w + zero) / scale).round_().clamp_(0, top)


def _better(
    best: tuple[Tensor, Tensor, Tensor], w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, top: int
) -> tuple[Tensor, ...]:
    """For each group the (error, scale, zero) of less error, of `best` and of the new ones as fp16 holds them."""
    scale, zero = scale.half().float(), zero.half().float()
    error = ((nearest(w, scale, zero, top) * scale - zero - w).square() * h).sum(0)
    less = error < best[0]
    return tuple(torch.where(less, new, old) for new, old in zip((error, scale, zero), best, strict=True))
