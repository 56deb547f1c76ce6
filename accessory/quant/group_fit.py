"""Whole numbers, a scale and a zero for groups of weights, that are as near to the weights as can be found quickly.

Rounding between the least and the largest weight spends most codes where few weights are. So the range is first cut at
both ends, in the best of a few ways; then scale and zero of least squares for these codes, and the nearest codes for
these, are taken in turn: neither ever makes the error larger. Of normal weights the squared error ends 1 or 2 % above
the least there is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

CLIPS = {2: (0.9, 0.7, 0.52), 3: (1.0, 0.85, 0.7), 4: (1.0, 0.93, 0.86)}
"""Bits -> the parts that are tried of the way from the mean to the least weight, and to the largest."""
TURNS = 6
"""How often codes and statistics are taken in turn."""
PIECE = 1 << 17  # weights fitted at a time on the CPU


def fit(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [N, K] -> codes uint8 [N, K], scales and zeros fp16 [N, G]: w is about code * scale - zero.

    A row's result does not depend on other rows. The last group may be shorter.
    """
    return by_groups(partial(fit_groups, bits=bits), weight, group)


def by_groups(
    fit_pieces: Callable[..., tuple[Tensor, Tensor, Tensor]], weight: Tensor, group: int, *statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit W [N, K] in pieces: codes uint8 [N, K], and two statistics [N, G].

    fit_pieces: (groups fp32 [group, M], a column each, and each of their `statistics` [M]) -> the same for these.
    """
    n, k = weight.shape
    rows = max(PIECE // max(k, 1), 1) if weight.device.type == "cpu" else max(n, 1)
    pieces = zip(weight.split(rows), *(statistic.split(rows) for statistic in statistics), strict=True)
    found = [_fit_rows(fit_pieces, part.float(), group, given) for part, *given in pieces]
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _fit_rows(fit_pieces: Callable, weight: Tensor, group: int, statistics: list[Tensor]) -> tuple[Tensor, ...]:
    n, k = weight.shape
    whole = k // group
    found = []
    for first, count, width in ((0, whole, group), (whole, 1, k - whole * group)):
        if count and width:
            # Groups lie beside each other, so that sums and products run along memory.
            start, groups = first * group, slice(first, first + count)
            apart = weight[:, start : start + count * width].reshape(n * count, width).t().contiguous()
            codes, *made = fit_pieces(apart, *(statistic[:, groups].flatten() for statistic in statistics))
            found.append((codes.t().reshape(n, -1), *(statistic.view(n, count) for statistic in made)))
    return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))


def fit_groups(w: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 w [group, M], a column a group -> codes uint8 [group, M], scales and zeros fp16 [M]."""
    mean, top = _mean(w), 2**bits - 1
    w = w - mean  # around zero, sums lose less
    low, high = w.amin(0), w.amax(0)
    least = torch.full_like(low, float("inf"))
    scale, zero = torch.zeros_like(low), torch.zeros_like(low)
    for below, above in product(CLIPS[bits], repeat=2):
        tried, offset = (high * above - low * below) / top, low * -below
        error = summed((_nearest(w, tried, offset, top).mul_(tried).sub_(offset).sub_(w)).square_())
        better = error < least
        least = torch.where(better, error, least)
        scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    for _ in range(TURNS):
        scale, zero = _least_squares(w, _nearest(w, scale, zero, top), scale, zero)
    scale = scale.half().float()
    zero = (_mean(_nearest(w, scale, zero, top)) * scale - mean).half()  # of w itself, for the scale as it is kept
    codes = _nearest(w, scale, zero.float() + mean, top)
    return codes.to(torch.uint8), scale.half(), zero


def _nearest(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The codes, fp32, whose values are nearest to w; zeros where the scale is zero."""
    steps = torch.where(scale > 0, 1 / scale, 0)
    return (w + zero).mul_(steps).round_().clamp_(0, top)


def _least_squares(w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero that suit the codes best; those given where all codes of a group are equal. w: of mean zero."""
    count = len(w)
    of_codes, of_squares, of_both = summed(codes), summed(codes * codes), summed(codes * w)
    spread = of_squares * count - of_codes.square()  # whole numbers, exact in fp32
    best = of_both * count / spread
    return (
        torch.where(spread > 0, best, scale),
        torch.where(spread > 0, best * of_codes / count, zero),
    )


def _mean(w: Tensor) -> Tensor:
    return summed(w) / len(w)


def summed(w: Tensor) -> Tensor:
    """Sums of groups w [group, M]: [M], in an order that depends on their length alone."""
    while len(w) > 1:
        half = len(w) // 2
        rest = w[2 * half :]
        w = w[:half] + w[half : 2 * half]
        if len(rest):
            w[0] += rest[0]
    return w[0]
