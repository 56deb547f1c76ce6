"""accessory/quantizer/gptq.py against Optimal Brain Surgeon's own formulas in float64, a column at a time."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import CheckpointError
from accessory.quantizer.gptq import DAMPING, curvature, damp_, gptq, output_error
from accessory.quantizer.grid import fit


def correlated(columns: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weights [rows, columns], inputs [T, columns] whose channels belong together, their X^T X)."""
    generator = torch.Generator().manual_seed(columns)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(600, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), x, x.t() @ x


def by_elimination(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, ...]:
    """Hassibi and Stork's update: no Cholesky factor, no batches of columns; H^-1 loses each column it is done with."""
    h = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse, w = torch.linalg.inv(h), weight.double().clone()
    codes, columns = torch.zeros_like(w), len(h)
    statistics = []
    for k in range(columns):
        if k % group == 0:
            own = slice(k, min(k + group, columns))
            statistics.append(fit(w[:, own].t().float().contiguous(), h.diagonal()[own].float(), 2**bits - 1))
        scale, zero = (each.double() for each in statistics[-1])
        codes[:, k] = ((w[:, k] + zero) / scale).round().clamp(0, 2**bits - 1)
        error = (w[:, k] - (codes[:, k] * scale - zero)) / inverse[k, k]
        w[:, k:] -= error[:, None] * inverse[k, k:]
        inverse = inverse - torch.outer(inverse[:, k], inverse[k]) / inverse[k, k]
    return codes, *(torch.stack(each, 1) for each in zip(*statistics, strict=True))


@pytest.mark.parametrize(("bits", "group", "columns"), [(2, 64, 192), (3, 32, 96), (4, 128, 200), (2, 64, 72)])
def test_is_optimal_brain_surgery(bits: int, group: int, columns: int) -> None:
    """Codes and statistics are the same; a shorter last group and batches of 64 columns change nothing."""
    weight, _, hessian = correlated(columns)
    grid, lost = gptq(weight, curvature(damp_(hessian.clone())), bits, group)
    codes, scales, zeros = by_elimination(weight, hessian, bits, group)
    assert (grid.rounded().codes.double() == codes).double().mean() > 0.995  # fp32 may tip one that lies on an edge
    assert torch.allclose(grid.scales, scales, rtol=0.02) and torch.allclose(grid.zeros, zeros, rtol=0.02, atol=0.02)
    assert ((grid.codes - grid.rounded().codes).abs() <= 0.5).all()
    assert lost == pytest.approx(
        float(output_error(grid.rounded().weights() - weight, damp_(hessian.clone())).sum()), rel=1e-3
    )


def test_whole_points_cost_little() -> None:
    """Zeros are whole multiples of the scales; the error of outputs is little above that of zeros of any value."""
    weight, x, hessian = correlated(128, rows=16)
    of_inputs = curvature(damp_(hessian.clone()))
    grids = [gptq(weight, of_inputs, 3, 64, whole=whole)[0].rounded() for whole in (False, True)]
    assert grids[0].points is None and torch.equal(grids[1].zeros, grids[1].points * grids[1].scales)
    assert torch.equal(grids[1].points, grids[1].points.round().clamp(0, 7))
    free, whole = (float(((grid.weights() - weight) @ x.t()).square().sum()) for grid in grids)
    assert free < whole < 1.4 * free


def test_outputs_suffer_less_than_by_rounding() -> None:
    """The error of outputs, counted on the inputs themselves, is well below that of rounding to such a grid."""
    weight, x, hessian = correlated(128)
    grid = gptq(weight, curvature(damp_(hessian.clone())), 2, 64)[0].rounded()
    error = ((grid.weights() - weight) @ x.t()).square().sum()
    columns = weight.t().contiguous()
    halves = [fit(columns[part], hessian.diagonal()[part], 3) for part in (slice(0, 64), slice(64, 128))]
    rounded = torch.cat(
        [((columns[part] + zero) / scale).round().clamp(0, 3) * scale - zero
         for part, (scale, zero) in zip((slice(0, 64), slice(64, 128)), halves, strict=True)]
    ).t()  # fmt: skip
    plain = ((rounded - weight) @ x.t()).square().sum()
    assert error < 0.75 * plain
    assert torch.allclose(output_error(grid.weights() - weight, hessian).sum(), error, rtol=1e-3)


def test_channels_that_are_never_used() -> None:
    """Text in which a channel is always zero leaves H singular; the damping makes up for it."""
    weight, x, _ = correlated(64)
    x[:, ::4] = 0
    assert gptq(weight, curvature(damp_(x.t() @ x)), 2, 64)[0].weights().isfinite().all()


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(
        CheckpointError, match="The inputs of a linear have a sum of squares of nan; expected finite ones"
    ):
        damp_(torch.full((4, 4), float("nan")))
