"""Whole zero points in the place of zeros of any value: w = (q - point) * scale, the grid of GPTQ and AWQ.

A point beside the best zero is off by up to half a scale, which of 2 bits is as much as rounding itself. Scale and
codes are therefore fitted again for each of the nearest points. With more bits than the codes had, a scale of a half,
a third and so on of theirs brings whole points nearer to their zeros.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from accessory.quant.group_fit import by_groups, fit, summed

TURNS = 3
"""How often codes and scale are taken in turn."""
STRETCHED = (0.9, 1.0, 1.1)
"""What the scale is multiplied by at first: another point leaves out weights at one end, or a code at the other."""


def fit_whole(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """W [N, K] -> codes uint8 [N, K], scales fp16 and points uint8 [N, G]: w is about (code - point) * scale.

    A row's result does not depend on other rows. The last group may be shorter.
    """
    _, scales, zeros = fit(weight, bits, group)
    return by_groups(partial(_beside, top=2**bits - 1), weight, group, scales.float(), zeros.float())


def widened(
    weight: Tensor, scales: Tensor, zeros: Tensor, group: int, *, bits: int, wide: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`fit_whole` to numbers of `wide` bits, of a W that is on a grid of `bits` bits: its scales and zeros [N, G]."""
    top, parts = 2**wide - 1, (2**wide - 1) // (2**bits - 1)
    fitted = partial(_finer, top=top, narrow=2**bits - 1) if parts > 1 else partial(_beside, top=top)
    return by_groups(fitted, weight, group, scales.float(), zeros.float())


def _beside(w: Tensor, scale: Tensor, zero: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups w fp32 [group, M], near a grid of scale and zero [M]: the two points beside the zero are tried."""
    flat = scale <= 0  # all weights of the group are alike: their code is 1 off the point
    scale = torch.where(flat, zero.abs(), scale)
    least, found = (torch.full_like(scale, float("inf")) for _ in range(2))
    point, below = torch.zeros_like(scale), (zero / scale).nan_to_num(0).floor()
    for tried in (below.clamp(0, top), (below + 1).clamp(0, top)):
        for factor in STRETCHED:
            stretched = _alternated(w, scale * factor, tried, top)
            error = summed((_offsets(w, stretched, tried, top) * stretched - w).square_())
            less = error < least
            least = torch.where(less, error, least)
            found, point = torch.where(less, stretched, found), torch.where(less, tried, point)
    return _codes(w, found, point, top)


def _finer(w: Tensor, scale: Tensor, zero: Tensor, top: int, narrow: int) -> tuple[Tensor, Tensor, Tensor]:
    """Groups w on a grid of numbers up to `narrow`: multiples of these, the best of all that there are up to `top`."""
    numbers = ((w + zero) * torch.where(scale > 0, 1 / scale, 0)).round_()
    count, linear, square = len(w), summed(numbers), summed(numbers.square())
    best, found, point = torch.full_like(scale, -1), scale, torch.zeros_like(scale)
    for part in range(1, top // narrow + 1):
        exact = torch.where(scale > 0, zero / scale, 0) * part
        for tried in (exact.floor().clamp(0, top), exact.ceil().clamp(0, top)):
            # w = scale * number - zero and offset = part * number - point, without a look at single weights
            squares = part * part * square - 2 * part * tried * linear + tried * tried * count
            both = scale * (part * square - tried * linear) - zero * (part * linear - tried * count)
            explained = torch.where(squares > 0, both * both / squares, 0)
            more = explained > best
            best, point = torch.where(more, explained, best), torch.where(more, tried, point)
            found = torch.where(more, torch.where(squares > 0, both / squares, scale / part), found)
    flat = (scale <= 0) | (found <= 0)
    found, point = torch.where(flat, zero.abs(), found), torch.where(flat, (zero > 0).float(), point)
    return _codes(w, _alternated(w, found, point, top), point, top)


def _codes(w: Tensor, scale: Tensor, point: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    codes = _offsets(w, scale, point, top) + point
    return codes.to(torch.uint8), scale.half(), point.to(torch.uint8)


def _alternated(w: Tensor, scale: Tensor, point: Tensor, top: int) -> Tensor:
    """The scale, as fp16 has it, after turns of nearest codes and the scale of least squares for them."""
    for _ in range(TURNS):
        offsets = _offsets(w, scale, point, top)
        squares = summed(offsets.square())
        scale = torch.where(squares > 0, summed(offsets * w) / squares, scale)
    return scale.half().float()


def _offsets(w: Tensor, scale: Tensor, point: Tensor, top: int) -> Tensor:
    """Nearest codes less the point, fp32; zeros where the scale is zero."""
    steps = torch.where(scale > 0, 1 / scale, 0)
    return (w * steps).round_().clamp_(-point, top - point)
