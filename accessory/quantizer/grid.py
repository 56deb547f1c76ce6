"""Scale, zero and whole numbers of groups of weights, by least squares in which each column has its own weight."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

CLIPS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Parts of a group's range, below its mean and above it, that are tried first, each with each."""
STRETCHES = (0.9, 1.0, 1.1)
"""What the scale is multiplied by at first for a whole zero point."""
TURNS = 6
"""How often statistics and codes are taken in turn."""
PIECE = 1 << 20
"""Numbers of a matrix that are worked on at a time where whole matrices beside it would take much memory."""
LEAST_SCALE = 1e-7  # the smallest that fp16 has without losing most digits


class Grid(NamedTuple):
    """W [N, K] is about codes * scales - zeros: codes [N, K], whole numbers or near them; scales, zeros [N, G], fp32.

    Column k belongs to group k // group; the last group may have fewer columns. Codes are from 0 to 2^bits - 1.
    points [N, G]: whole numbers, fp32, if zeros are to stay these times the scales; else None.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group: int
    points: Tensor | None = None

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    def rounded(self) -> Grid:
        """Codes rounded to whole numbers of the range, and statistics to what fp16 holds."""
        codes, scales = self.codes.round().clamp_(0, self.top), self.scales.half().float()
        zeros = self.zeros.half().float() if self.points is None else self.points * scales
        return self._replace(codes=codes, scales=scales, zeros=zeros)

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
        best = _better(best, w, h, _as_half(scale), _as_half(-(mean + below * low)), top)
    for _ in range(TURNS):
        _, scale, zero = best
        codes = nearest(w, scale, zero, top)
        of_codes, of_weights = (codes * h).sum(0), (w * h).sum(0)
        apart = codes - of_codes
        steps = (apart * w * h).sum(0) / (apart.square() * h).sum(0).clamp_min(1e-12)
        scale = torch.where(steps > LEAST_SCALE, steps, scale)
        best = _better(best, w, h, _as_half(scale), _as_half(scale * of_codes - of_weights), top)
    return best[1], best[2]


def fit_whole(w: Tensor, importance: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """As `fit`, with a zero that is a whole number from 0 to `top` times the scale, as fp16 holds that.

    Rounding the zero of `fit` may be off by half a scale; so scale and codes are fitted again for both whole numbers
    beside it, from a few scales each: with another zero, weights are left out at one end, or codes at the other.
    """
    h = importance[:, None] / importance.sum()
    free, zero = fit(w, importance, top)
    below = (zero / free).floor()
    best = (torch.full_like(free, float("inf")), free, zero)
    for point, stretch in product((below.clamp(0, top), (below + 1).clamp(0, top)), STRETCHES):
        scale = free * stretch
        for turn in range(TURNS):
            if turn:
                offsets = nearest(w, scale, point * scale, top) - point
                steps = (offsets * w * h).sum(0) / (offsets.square() * h).sum(0).clamp_min(1e-12)
                scale = torch.where(steps > LEAST_SCALE, steps, scale)
            scale = _as_half(scale)
            best = _better(best, w, h, scale, point * scale, top)
    return best[1], best[2]


def nearest(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The codes from 0 to `top`, fp32, whose values code * scale - zero are nearest to w."""
    return ((w + zero) / scale).round_().clamp_(0, top)


def _better(
    best: tuple[Tensor, Tensor, Tensor], w: Tensor, h: Tensor, scale: Tensor, zero: Tensor, top: int
) -> tuple[Tensor, ...]:
    """For each group the (error, scale, zero) with less error: `best`'s or the new one."""
    error = ((nearest(w, scale, zero, top) * scale - zero - w).square() * h).sum(0)
    less = error < best[0]
    return tuple(torch.where(less, new, old) for new, old in zip((error, scale, zero), best, strict=True))


def _as_half(statistic: Tensor) -> Tensor:
    """The values rounded to fp16, as fp32."""
    return statistic.half().float()
