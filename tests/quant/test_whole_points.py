"""Grids with whole zero points, against all grids there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.quant.group_fit import fit
from accessory.quant.groups import group_storage
from accessory.quant.whole_points import fit_whole, widened


def weights(rows: int = 24, columns: int = 72) -> Tensor:
    """[rows, columns] around means of their own; some groups are constant, or all above zero."""
    torch.manual_seed(0)
    w = torch.randn(rows, columns) + 0.3 * torch.randn(rows, 1)
    w[1, :32], w[2, :32], w[3, :32], w[4, :32] = 0.25, -0.25, 0, w[4, :32].abs()
    return w


def on_grid(codes: Tensor, scales: Tensor, points: Tensor, group: int) -> Tensor:
    """What the parts mean, in float64: [N, K]."""
    index = torch.arange(codes.shape[1]) // group
    return (codes.double() - points.double()[:, index]) * scales.double()[:, index]


def least_error(w: Tensor, bits: int) -> float:
    """The squared error of the best grid for one group, by trying them."""
    scales = torch.linspace(0.02, 3, 1500).half().double()[:, None]
    found = []
    for point in range(2**bits):
        offsets = (w.double() / scales).round().clamp(-point, 2**bits - 1 - point)
        found.append((offsets * scales - w.double()).square().sum(1).min())
    return float(min(found))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_little_is_lost_beside_the_best_grid(bits: int) -> None:
    """Together, and in no group much; constant groups are exact."""
    w = weights()
    found = on_grid(*fit_whole(w, bits, 32), 32)
    error = (found - w).square()[:, :32].sum(1)
    best = torch.tensor([least_error(row, bits) for row in w[:, :32]], dtype=torch.float64)
    assert error.sum() < 1.1 * best.sum() and (error <= 3 * best + 1e-6).all()
    assert torch.equal(found[1:4, :32].float(), w[1:4, :32])
    assert (found - w)[:, 64:].square().mean() < 0.5 * w[:, 64:].square().mean()  # the last group, which is shorter


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rows_are_fitted_by_themselves(bits: int) -> None:
    """A slice is the whole's slice, to the bit."""
    w = weights()
    whole = fit_whole(w, bits, 32)
    for found, expected in zip(fit_whole(w[5:9], bits, 32), whole, strict=True):
        assert torch.equal(found, expected[5:9])


@pytest.mark.parametrize(("bits", "most"), [(2, 0.06), (3, 0.1), (4, 0.1)])
def test_a_grid_is_held_by_one_of_more_bits(bits: int, most: float) -> None:
    """Much nearer than by rounding its zeros, and exactly where they are whole."""
    w = weights(64)
    codes, scales, zeros = fit(w, bits, 32)
    index = torch.arange(72) // 32
    grid = codes * scales.float()[:, index] - zeros.float()[:, index]
    found = on_grid(*widened(grid, scales, zeros, 32, bits=bits, wide=4), 32)
    assert (found - grid).norm() < most * grid.norm()
    points = (zeros.float() / scales.float()).nan_to_num(0).round().clamp(0, 2**bits - 1)
    exact = (codes - points[:, index]) * scales.float()[:, index]
    scaled = (points * scales.float(), 32)
    again = on_grid(*widened(exact, scales, *scaled, bits=bits, wide=4), 32)
    torch.testing.assert_close(again.float(), exact, rtol=0, atol=1e-3 * float(exact.abs().max()))


def test_a_storage_with_points_is_packed_so() -> None:
    """`pack` of that variant fits whole points; weights beyond fp16 are refused."""
    kind = group_storage(3, 64, ("points",))
    w = weights(8, 128)
    matrix = kind((8, 128))
    matrix.pack(w)
    codes, scales, points = fit_whole(w, 3, 64)
    assert torch.equal(matrix.points, points) and torch.equal(matrix.scales, scales)
    torch.testing.assert_close(matrix.unpack(torch.float32).double(), on_grid(codes, scales, points, 64))
    with pytest.raises(Exception, match="weights that fp16 cannot hold"):
        matrix.pack(w * 1e7)
