"""accessory/quantizer/reconstruction.py: its loss in float64, its schedule, and that it helps."""

from __future__ import annotations

import pytest
import torch

from accessory.model.projection import project
from accessory.parallel import groups
from accessory.quantizer.gptq import curvature, damp_, gptq
from accessory.quantizer.reconstruction import Rates, factor, relative_error, train_block
from accessory.quantizer.weights import LatentWeight


def test_relative_error() -> None:
    """Each token counts by its own length: one a thousand times as long is one of many."""
    wanted = torch.randn(5, 16)
    wanted[0] *= 1000
    found = wanted + torch.randn(5, 16) * wanted.square().mean(1, keepdim=True).sqrt() * 0.1
    expected = [
        float((found[i] - wanted[i]).double().square().sum() / wanted[i].double().square().sum()) for i in range(5)
    ]
    assert float(relative_error(found, wanted)) == pytest.approx(sum(expected) / 5, rel=1e-4)


def test_schedule() -> None:
    """It warms up over eight steps and ends near a twentieth."""
    found = [factor(step, 100) for step in range(100)]
    assert found[0] == pytest.approx(1 / 8, rel=1e-2) and found.index(max(found)) == 7
    assert found[-1] == pytest.approx(0.05, abs=0.01)


def test_training_lowers_the_error() -> None:
    """Of a linear whose inputs were changed by quantization before it, on rows that it was not trained on."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator)
    full = torch.randn(40, 96, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    given = full * 0.8 + full.roll(1, 2) * 0.3
    flat = given[:32].flatten(0, 1)
    grid, _ = gptq(weight, curvature(damp_(flat.t() @ flat)), 2, 64)

    def error(rows: list[int]) -> torch.Tensor:
        matrix = latent.as_grid().weights()
        return relative_error(given[rows].flatten(0, 1) @ matrix.t(), full[rows].flatten(0, 1) @ weight.t())

    first, latent = grid.rounded().codes, LatentWeight(grid)
    before = error(list(range(32, 40)))

    def run(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        (found,) = project(given[rows].flatten(0, 1), [latent])
        return found, full[rows].flatten(0, 1) @ weight.t()

    groups.start("cpu")
    steps = [[(2 * i) % 32, (2 * i + 1) % 32] for i in range(64)]
    losses = train_block(latent, [latent], run, steps, Rates(), groups.data_parallel_group())
    assert len(losses) == 64 and sum(losses[-8:]) < sum(losses[:8])
    assert error(list(range(32, 40))) < 0.9 * before
    assert 0 < (latent.as_grid().codes != first).float().mean() < 0.5
