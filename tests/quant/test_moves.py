"""accessory/quant/moves.py against loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.kernels.codes import whole_numbers
from accessory.quant.groups import packed_codes
from accessory.quant.moves import STANDS_OUT, Integers, best_moves, round_released, usual_columns

ROWS, COLUMNS, GROUP = 9, 40, 16
TOKENS, NOISE = 50.0, 0.05


@pytest.fixture(params=[2, 3, 4])
def integers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Integers:
    """Random ones, some scales negative; they are looked at some rows at a time."""
    monkeypatch.setattr("accessory.quant.moves.PIECE", 4 * COLUMNS)
    torch.manual_seed(request.param)
    parts = packed_codes(torch.randint(0, 1 << request.param, (ROWS, COLUMNS), dtype=torch.uint8), request.param)
    groups = torch.arange(COLUMNS) // GROUP
    return Integers(request.param, parts["codes"], parts.get("high"), torch.randn(ROWS, 3), groups)


def numbers_of(integers: Integers) -> Tensor:
    """One by one."""
    return whole_numbers(integers.codes, integers.high, integers.bits, COLUMNS).long()


def factors(size: float) -> tuple[Tensor, Tensor]:
    """[N, 2], [2, K]."""
    return size * torch.randn(ROWS, 2), torch.randn(2, COLUMNS)


def test_best_moves(integers: Integers) -> None:
    """The one of each row that gains most, of those that may be made."""
    wished, gradient, variance = factors(1.0), factors(3.0), tuple(part.abs() for part in factors(0.3))
    gradient[0][2] = 0  # nothing to gain in this row
    usual = torch.arange(COLUMNS) % 7 > 0
    found = best_moves(integers, wished, gradient, variance, usual, TOKENS, NOISE)
    wish, slope, spread = (a.double() @ b.double() for a, b in (wished, gradient, variance))
    numbers, made = numbers_of(integers), 0
    for row in range(ROWS):
        best = (0.0, None)
        for column in range(COLUMNS):
            scale, wanted = integers.scales[row, column // GROUP].double(), wish[row, column]
            by = int(torch.sign(wanted) * torch.sign(scale))
            after, moved = numbers[row, column] + by, by * scale
            gain = -slope[row, column] * moved - TOKENS * spread[row, column] * moved**2 / 2
            may = usual[column] and abs(wanted) >= abs(scale) / 2 and 0 <= after < 1 << integers.bits
            if may and slope[row, column] ** 2 >= STANDS_OUT**2 * NOISE * spread[row, column] and gain > best[0]:
                best = (gain, (column, by, wanted, moved))
        assert found.gain[row].item() == pytest.approx(float(best[0]), rel=1e-4, abs=1e-5)
        if best[1]:
            made += 1
            assert (found.column[row], found.by[row]) == best[1][:2]
            assert found.wished[row].item() == pytest.approx(best[1][2].item(), rel=1e-4)
            assert found.size[row].item() == pytest.approx(best[1][3].item(), rel=1e-4)
    assert 0 < made < ROWS


def test_moving_there_and_back(integers: Integers) -> None:
    """Only the stated numbers change, by one; moved back, every byte is as it was."""
    numbers, parts = numbers_of(integers), [part for part in integers[1:3] if part is not None]
    before = [part.clone() for part in parts]
    rows, column = torch.tensor([1, 4, 8]), torch.tensor([39, 0, 17])
    by = torch.where(numbers[rows, column] > 0, -1, 1).to(torch.int8)
    integers.move(rows, column, by)
    wanted = numbers.clone()
    wanted[rows, column] += by
    assert torch.equal(numbers_of(integers), wanted)
    integers.move(rows, column, -by)
    assert all(torch.equal(now, then) for now, then in zip(parts, before, strict=True))


def test_the_released_rule(integers: Integers) -> None:
    """round((W + displacement + zero) / scale), whatever the zero; a displacement of less than half a step is lost."""
    numbers, wished = numbers_of(integers), factors(0.5)
    scales = integers.scales.double()[:, integers.groups]
    exact = (numbers * scales + wished[0].double() @ wished[1].double()) / scales
    wanted = exact.round().clamp(0, (1 << integers.bits) - 1).long()
    assert round_released(integers, wished) == (wanted != numbers).sum() > 0
    assert torch.equal(numbers_of(integers), wanted)
    smallest = integers.scales.abs().min() * 0.49
    small = (torch.full((ROWS, 1), float(smallest)), torch.ones(1, COLUMNS))
    assert round_released(integers, small) == 0


def test_usual_columns() -> None:
    """Up to three times the median."""
    assert usual_columns(torch.tensor([1.0, 2.0, 6.0, 6.1, 0.0])).tolist() == [True, True, True, False, True]
