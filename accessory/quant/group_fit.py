"""Whole numbers, a scale and a zero for groups of weights, that are as near to the weights as can be found quickly.

Rounding between the least and the largest weight spends most codes where few weights are. So the range is first cut at
both ends, in the best of a few ways; then scale and zero of least squares for these codes, and the nearest codes for
these, are taken in turn: neither ever makes the error larger. Of normal weights the squared error ends 1 or 2 % above
the least there is.
"""

from __future__ import annotations

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
    n, k = weight.shape
    rows = max(PIECE // max(k, 1), 1) if weight.device.type == "cpu" else max(n, 1)
    found = [_fit_rows(part.float(), bits, group) for part in weight.split(rows)]
    codes, scales, zeros = (torch.cat(parts) for parts in zip(*found, strict=True))
    return codes, scales, zeros


def _fit_rows(weight: Tensor, bits: int, group: int) -> tuple[Tensor, ...]:
    n, k = weight.shape
    whole = k // group
    found = []
    for columns, count in ((weight[:, : whole * group], whole), (weight[:, whole * group :], 1)):
        if columns.numel():
            # Groups lie beside each other, so that sums and products run along memory.
            apart = columns.reshape(n * count, -1).t().contiguous()
            codes, scales, zeros = fit_groups(apart, bits)
            found.append((codes.t().reshape(n, -1), scales.view(n, count), zeros.view(n, count)))
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
        error = _sum((_nearest(w, tried, offset, top).mul_(tried).sub_(offset).sub_(w)).square_())
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
    of_codes, of_squares, of_both = _sum(codes), _sum(codes * codes), _sum(codes * w)
    spread = of_squares * count - of_codes.square()  # whole numbers, exact in fp32
    best = of_both * count / spread
    return (
        torch.where(spread > 0, best, scale),
        torch.where(spread > 0, best * of_codes / count, zero),
    )


def _mean(w: Tensor) -> Tensor:
    return _sum(w) / len(w)


def _sum(w: Tensor) -> Tensor:
    """Over groups, in an order that depends on their length alone."""
    while len(w) > 1:
        half = len(w) // 2
        rest = w[2 * half :]
        w = w[:half] + w[half : 2 * half]
        if len(rest):
            w[0] += rest[0]
    return w[0]
