"""accessory/quantizer/grid.py against float64 sums and every choice of codes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from accessory.quantizer.grid import Grid, fit, fit_whole, nearest, on_grid


def groups(count: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [columns, count], some of whose columns matter much more, and the importance of these [columns]."""
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(columns, count, generator=generator), torch.rand(columns, generator=generator) + 0.1


def cost(w: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int) -> torch.Tensor:
    values = nearest(w, scale, zero, top) * scale - zero
    return ((values - w).double().square() * importance[:, None].double()).sum(0)


def test_near_the_best_of_all_codes() -> None:
    """Of 6 weights at 2 bits, every choice of codes is tried with its least-squares line: ours costs little more."""
    w, importance = groups(40, 6)
    scale, zero = fit(w, importance, 3)
    ours = cost(w, importance, scale, zero, 3).numpy()
    roots, best = np.sqrt(importance.double().numpy()), np.full(40, np.inf)
    for codes in product(range(4), repeat=6):
        if len(set(codes)) > 1:
            design = np.stack([codes, -np.ones(6)], 1) * roots[:, None]
            _, residual, *_ = np.linalg.lstsq(design, w.double().numpy() * roots[:, None], rcond=None)
            best = np.minimum(best, residual)
    assert (ours <= best * 1.5 + 1e-6).mean() >= 0.9
    assert ours.sum() <= best.sum() * 1.1


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_better_than_the_whole_range(bits: int) -> None:
    """Never worse than from the least to the largest weight, and much better on average."""
    w, importance = groups(64, 64)
    top = 2**bits - 1
    scale, zero = fit(w, importance, top)
    assert torch.equal(scale, scale.half().float()) and torch.equal(zero, zero.half().float())
    plain = ((w.amax(0) - w.amin(0)) / top).half().float()
    low = ((plain * top - (w.amax(0) + w.amin(0))) / 2).half().float()
    ours, theirs = cost(w, importance, scale, zero, top), cost(w, importance, plain, low, top)
    assert (ours <= theirs * 1.0001).all()
    assert ours.sum() < 0.85 * theirs.sum()


def test_equal_weights() -> None:
    """A group of equal weights is found exactly, but for fp16: it has no range to divide."""
    w = torch.tensor([[0.25, 0.0, -3.0]]).expand(32, 3).contiguous()
    scale, zero = fit(w, torch.ones(32), 3)
    assert torch.allclose(nearest(w, scale, zero, 3) * scale - zero, w, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_whole_points_near_the_best_there_are(bits: int) -> None:
    """Zeros are whole multiples of scales, to the bit; a fine grid of scales for every point finds little better."""
    top = 2**bits - 1
    w, importance = groups(30, 48)
    w[:, 0], w[:, 1], w[:, 2] = w[:, 0].abs() + 0.1, 0.25, -3.0
    scale, zero = fit_whole(w, importance, top)
    points = (zero / scale).round()
    assert torch.equal(points * scale, zero) and torch.equal(scale, scale.half().float())
    assert points.min() >= 0 and points.max() <= top
    ours = cost(w, importance, scale, zero, top)
    best = torch.full_like(ours, float("inf"))
    for tried, point in product(torch.linspace(0.02, 3.2, 1000), range(top + 1)):
        best = torch.minimum(best, cost(w, importance, tried.expand(30), (tried * point).expand(30), top))
    assert (ours <= 1.3 * best + 1e-5).all() and ours.sum() < 1.05 * best.sum()


def test_on_a_grid_with_a_short_last_group() -> None:
    """Column k takes the statistics of group k // 32."""
    codes = torch.arange(40.0).expand(2, 40) % 4
    scales, zeros = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 1.5], [2.5, 3.5]])
    found = on_grid(codes, scales, zeros, 32)
    expected = [[codes[n, k] * scales[n, k // 32] - zeros[n, k // 32] for k in range(40)] for n in range(2)]
    assert torch.equal(found, torch.tensor(expected))
    grid = Grid(codes + 0.3, scales, zeros, 2, 32)
    assert torch.equal(grid.rounded().weights(), found)
    whole = Grid(codes + 0.3, scales / 3, zeros, 2, 32, torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    assert torch.equal(whole.rounded().zeros, whole.points * (scales / 3).half().float())
