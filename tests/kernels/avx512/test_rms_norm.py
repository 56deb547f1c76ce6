"""RMSNorm in C++ against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.avx512.rms_norm import CHUNK, backward, forward, recompute

EPS = 1e-3  # large enough to show in the values


def operands(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random x, its gradient, and a weight."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).bfloat16() for _ in range(2))
    return x, dy, 1 + torch.randn(shape[-1], generator=generator)


@pytest.mark.parametrize("shape", [(5, 64), (3 * CHUNK + 5, 40), (3, 5, 1), (2, 3000), (0, 16)])
def test_equals_float64(shape: tuple[int, ...]) -> None:
    """Only the results are rounded; the weight's gradient is fp32, over several chunks of rows."""
    x, dy, weight = operands(*shape)
    wide, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.rms_norm(wide, weight.shape, wide_weight, EPS)
    dx, dweight = torch.autograd.grad(y, (wide, wide_weight), dy.double())
    inverse = (wide.detach().square().mean(-1, keepdim=True) + EPS).rsqrt()
    found_y, scale = forward(x, weight, EPS)
    found = (found_y, scale, *backward(dy, x, weight, scale))
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32] * 2
    roundings = (1.01 * 2**-8, 1e-6, 1.01 * 2**-8, 1e-5)
    for one, other, rounding in zip(found, (y.detach(), inverse, dx, dweight), roundings, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=rounding, atol=1e-5)


def test_again_is_the_same() -> None:
    """Bit by bit."""
    x, _, weight = operands(7, 100)
    y, scale = forward(x, weight, EPS)
    assert torch.equal(recompute(x, weight, scale), y)


@pytest.mark.parametrize(("need_dx", "need_dweight"), [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(need_dx: bool, need_dweight: bool) -> None:
    """Each alone is what it is together with the other; what is not wanted is not made."""
    x, dy, weight = operands(40, 64)
    _, scale = forward(x, weight, EPS)
    both = backward(dy, x, weight, scale)
    found = backward(dy, x, weight, scale, need_dx=need_dx, need_dweight=need_dweight)
    for one, other, wanted in zip(found, both, (need_dx, need_dweight), strict=True):
        assert torch.equal(one, other) if wanted else one is None


@pytest.mark.usefixtures("threads")
def test_threads_change_nothing() -> None:
    """Not a bit of the weight's gradient either."""
    x, dy, weight = operands(5 * CHUNK + 1, 64)

    def run() -> tuple[Tensor, ...]:
        y, scale = forward(x, weight, EPS)
        return y, scale, *backward(dy, x, weight, scale)

    found = run()
    torch.set_num_threads(1)
    assert all(map(torch.equal, found, run()))


def test_slices() -> None:
    """Of wider rows."""
    x, dy, weight = operands(6, 64)
    y, scale = forward(x[:, 8:40], weight[::2], EPS)
    assert torch.equal(y, forward(x[:, 8:40].clone(), weight[::2].clone(), EPS)[0])
    found = backward(dy[:, 8:40], x[:, 8:40], weight[::2], scale)
    assert all(map(torch.equal, found, backward(dy[:, 8:40].clone(), x[:, 8:40].clone(), weight[::2].clone(), scale)))
