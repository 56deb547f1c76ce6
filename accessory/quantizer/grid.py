"""Scale, zero and whole numbers of groups of weights, by least squares in which each column has its own weight."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Parts of a group's range, below its mean and above it, that are tried first, each with each."""
TURNS = 6
"""How often statistics and codes are taken in turn."""
PIECE = 1 << 20
"""Numbers of a matrix that are worked on at a time where whole matrices beside it would take much memory."""
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
    """codes [N, K] * scales - zeros [N, G] -> [N, K] in the codes' dtype; takes no memory beside the result."""
    found, columns = torch.empty_like(codes), codes.shape[1]
    whole = columns // group
    for place, own in ((slice(0, whole * group), slice(0, whole)), (slice(whole * group, columns), slice(whole, None))):
        if place.start < place.stop:
            count = scales[:, own].shape[1]
            parts = (each[:, place].unflatten(1, (count, -1)) for each in (codes, found))
            torch.addcmul(-zeros[:, own, None], next(parts), scales[:, own, None], out=next(parts))
    return found


def pieces(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows of a matrix [rows, columns] of about `PIECE` numbers each, for work that needs memory for them."""
    step = max(PIECE // max(columns, 1), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


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
