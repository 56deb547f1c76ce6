"""accessory/quantizer/weights.py against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from accessory.model.projection import project
from accessory.quantizer.grid import Grid
from accessory.quantizer.weights import LatentWeight, Moments, WatchedWeight, WholeLatentWeight, latent_weight


class Straight(torch.autograd.Function):
    """Rounding to whole numbers from 0 to `top`; a gradient goes through where the result is not cut off."""

    @staticmethod
    def forward(ctx, v: torch.Tensor, top: int) -> torch.Tensor:
        ctx.save_for_backward((v > -0.5) & (v < top + 0.5))
        return v.round().clamp(0, top)

    @staticmethod
    def backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        return dy * ctx.saved_tensors[0], None


@pytest.mark.parametrize(("bits", "group", "columns"), [(2, 64, 128), (4, 32, 80)])
def test_latent_gradients(bits: int, group: int, columns: int) -> None:
    """Of x, scales and zeros as autograd gives them through codes that are rounded; of codes but for their scale."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.rand(6, columns, generator=generator) * (2**bits + 1) - 1  # some lie outside
    scales, zeros = torch.rand(2, 6, -(-columns // group), generator=generator) + 0.5
    weight = LatentWeight(Grid(codes, scales, zeros, bits, group))
    x, dy = torch.randn(9, columns, generator=generator), torch.randn(9, 6, generator=generator)
    x.requires_grad_(True)
    (y,) = project(x, [weight])
    y.backward(dy)
    wide = [each.double().requires_grad_(True) for each in (codes, scales, zeros, x.detach())]
    of_column = torch.arange(columns) // group
    matrix = Straight.apply(wide[0], 2**bits - 1) * wide[1][:, of_column] - wide[2][:, of_column]
    expected = wide[3] @ matrix.t()
    expected.backward(dy.double())
    assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(x.grad.double(), wide[3].grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(weight.scales.grad.double(), wide[1].grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(weight.zeros.grad.double(), wide[2].grad, rtol=1e-4, atol=1e-4)
    undivided = wide[0].grad / wide[1].detach()[:, of_column]
    assert torch.allclose(weight.codes.grad.double(), undivided, rtol=1e-4, atol=1e-4)
    assert torch.equal(weight.as_grid().codes, codes.round().clamp(0, 2**bits - 1))


@pytest.mark.parametrize(("bits", "group", "columns"), [(3, 64, 128), (2, 32, 80)])
def test_whole_points_stay_and_zeros_follow_scales(bits: int, group: int, columns: int) -> None:
    """Gradients of x and scales are autograd's of (round(codes) - points) * scales; codes' but for their scale."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.rand(6, columns, generator=generator) * (2**bits + 1) - 1
    scales = torch.rand(6, -(-columns // group), generator=generator) + 0.5
    points = torch.randint(0, 2**bits, scales.shape, generator=generator).float()
    weight = latent_weight(Grid(codes, scales, points * scales, bits, group, points))
    assert isinstance(weight, WholeLatentWeight) and weight.trained == ("codes", "scales")
    x, dy = torch.randn(9, columns, generator=generator), torch.randn(9, 6, generator=generator)
    (y,) = project(x.requires_grad_(True), [weight])
    y.backward(dy)
    wide = [each.detach().double().requires_grad_(True) for each in (codes, scales, x)]
    of_column = torch.arange(columns) // group
    offsets = Straight.apply(wide[0], 2**bits - 1) - points.double()[:, of_column]
    (wide[2] @ (offsets * wide[1][:, of_column]).t()).backward(dy.double())
    assert torch.allclose(x.grad.double(), wide[2].grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(weight.scales.grad.double(), wide[1].grad, rtol=1e-4, atol=1e-4)
    undivided = wide[0].grad / wide[1].detach()[:, of_column]
    assert torch.allclose(weight.codes.grad.double(), undivided, rtol=1e-4, atol=1e-4)
    grid = weight.as_grid()
    assert torch.equal(grid.points, points) and torch.equal(grid.zeros, points * scales.half().float())


def test_moments() -> None:
    """Two matrices with the same input note its moments once, and each the gradients of its outputs, over all calls."""
    first = Moments()
    weights = [WatchedWeight(torch.randn(rows, 8).bfloat16(), moments)
               for rows, moments in ((3, first), (5, Moments(shared=first)))]  # fmt: skip
    xs, dys = torch.randn(2, 7, 8).bfloat16(), [torch.randn(2, 7, rows).bfloat16() for rows in (3, 5)]
    for i, x in enumerate(xs):
        results = project(x.clone().requires_grad_(True), weights)
        torch.autograd.backward(results, [dy[i] for dy in dys])
    flat = xs.flatten(0, 1).double()
    for weight, dy in zip(weights, dys, strict=True):
        assert torch.allclose(weight.moments.hessian().double(), flat.t() @ flat, rtol=1e-4, atol=1e-4)
        assert torch.allclose(weight.moments.gradients.double(), dy.double().square().sum((0, 1)), rtol=1e-4)
        assert weight.codes.grad is None
    assert weights[1].moments.inputs is None
