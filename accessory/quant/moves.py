"""Which whole numbers of a matrix in groups may move, and moving them: at most one of a row, by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.kernels.codes import whole_numbers
from accessory.quant.groups import packed_codes

PIECE = 1 << 18  # weights that are looked at together
BYTES = 50  # of a weight that is looked at
MOST_USUAL = 3.0
"""Times the median of all columns that the squared gradients of one may amount to for its whole numbers to move."""
STANDS_OUT = 4.0
"""Standard deviations of the noise that a mean gradient must have at least for a whole number to move."""


class Integers(NamedTuple):
    """W [N, K] without its zeros: the parts of `GroupCodes`. groups: int64 [K], the group of each column."""

    bits: int
    codes: Tensor
    high: Tensor | None
    scales: Tensor
    groups: Tensor

    @property
    def columns(self) -> int:
        """K."""
        return len(self.groups)

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(rows, whole numbers uint8, scale of each number fp32) of some rows after others."""
        step = max(PIECE // max(self.columns, 1), 1)
        for start in range(0, len(self.codes), step):
            rows = slice(start, start + step)
            high = None if self.high is None else self.high[rows]
            numbers = whole_numbers(self.codes[rows], high, self.bits, self.columns)
            yield rows, numbers, self.scales[rows].float()[:, self.groups]

    def move(self, rows: Tensor, column: Tensor, by: Tensor) -> None:
        """Add `by` int8 [M] to the whole numbers in `column` int64 [M] of `rows` int64 [M], each once, in place."""
        high = None if self.high is None else self.high[rows]
        numbers = whole_numbers(self.codes[rows], high, self.bits, self.columns).to(torch.int8)
        numbers[torch.arange(len(rows), device=rows.device), column] += by
        self.put(rows, numbers.to(torch.uint8))

    def put(self, rows: Tensor | slice, numbers: Tensor) -> None:
        """Replace the whole numbers uint8 [M, K] of some rows, in place."""
        for name, part in packed_codes(numbers, self.bits).items():
            getattr(self, name)[rows] = part


class Moves(NamedTuple):
    """One for each row of W: column int64 [N], by how much (-1, 1) int8 [N], and what it gains, fp32 [N].

    gain: by how much the loss is expected to fall; 0 where no whole number of the row may move. wished: the
    displacement of that weight, fp32 [N], in W's units; size: how far the move displaces it.
    """

    column: Tensor
    by: Tensor
    gain: Tensor
    wished: Tensor
    size: Tensor


def best_moves(
    integers: Integers,
    wished: tuple[Tensor, Tensor],
    gradient: tuple[Tensor, Tensor],
    variance: tuple[Tensor, Tensor],
    usual: Tensor,
    tokens: float,
    noise: float,
) -> Moves:
    """The move of each row that lowers the loss most.

    wished: factors [N, R], [R, K] of the displacement that is wished for; gradient, variance: those of the gradients'
    mean over steps, and of the mean of their squares, each of a loss over so many `tokens`. The loss's second
    derivative by a weight is the mean over tokens of squared gradients (Fisher's information): that of steps times
    `tokens`. usual: bool [K], see `usual_columns`. noise: the variance of the mean gradient in units of a step's.

    A whole number may move if rounding to the nearest would move it, if there is a next one, if its column is usual,
    if the mean gradient stands out of its noise, and if the first two terms of the loss's series then fall.
    """
    best = [torch.zeros(len(integers.codes), dtype=kind, device=integers.codes.device)
            for kind in (torch.int64, torch.int8, torch.float32, torch.float32, torch.float32)]  # fmt: skip
    for rows, numbers, scales in integers.pieces():
        wish = wished[0][rows] @ wished[1]
        by = wish.sign() * scales.sign()
        after, size = numbers + by, by * scales
        slope = gradient[0][rows] @ gradient[1]
        spread = variance[0][rows] @ variance[1]
        gain = -slope * size - tokens * spread * size.square() / 2
        may = (wish.abs() >= size.abs() / 2) & (after >= 0) & (after < 1 << integers.bits) & (by != 0)
        may &= usual
        may &= slope.square() >= STANDS_OUT**2 * noise * spread
        gain = torch.where(may, gain, 0).clamp_(min=0)
        found, column = gain.max(1)
        at = column[:, None]
        of_rows = (column, by.gather(1, at)[:, 0], found, wish.gather(1, at)[:, 0], size.gather(1, at)[:, 0])
        for whole, part in zip(best, of_rows, strict=True):
            whole[rows] = part.to(whole.dtype)
    return Moves(*best)


def usual_columns(energy: Tensor) -> Tensor:
    """Which columns have gradients like others', bool [K]; energy: each column's sum of squared gradients.

    What a channel of massive activations (Sun et al. 2024) does is beyond what two terms of a series can tell.
    """
    return energy <= MOST_USUAL * energy.median()


def round_released(integers: Integers, wished: tuple[Tensor, Tensor]) -> Tensor:
    """Round W + the displacement to the nearest whole numbers, in place, as the released rule does after each step.

    Returns how many changed, int64 []. (bitorch-engine's DiodeMix, for weights of 2 and 4 bits.)
    """
    changed = torch.zeros((), dtype=torch.int64, device=integers.codes.device)
    for rows, numbers, scales in integers.pieces():
        after = (numbers + (wished[0][rows] @ wished[1] / scales).round()).clamp_(0, (1 << integers.bits) - 1)
        changed += (after != numbers).sum()
        integers.put(rows, after.to(torch.uint8))
    return changed
