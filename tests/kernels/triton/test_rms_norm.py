"""RMSNorm against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.operands import DTYPES
from accessory.kernels.triton.rms_norm import WIDEST, backward, forward, recompute

EPS = 1e-3  # large enough to show in the values
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1.01 * 2**-8, torch.float16: 1.01 * 2**-11}
"""Relative error of one rounding to a dtype; for fp32, of a few."""


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, 1 / rms, dx and dweight in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.rms_norm(x, weight.shape, weight, EPS)
    y.backward(dy.double())
    return y.detach(), (x.detach().square().mean(-1, keepdim=True) + EPS).rsqrt(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (67, 48), (3, 5, 1), (2, 3000), (20, 1500)])
def test_equals_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Only the results are rounded: rows that share a program, rows no power of two, one a program, several in turn."""
    x, dy, weight = random(*shape, dtype=dtype), random(*shape, seed=1, dtype=dtype), 1 + random(shape[-1], seed=2)
    wanted = exact(x, weight, dy)
    y, scale = forward(x, weight, EPS)
    found = (y, scale, *backward(dy, x, weight, scale))
    assert [t.dtype for t in found] == [dtype, torch.float32, dtype, torch.float32]
    for one, other, rounding in zip(found, wanted, [ROUNDING[dtype], 1e-6, ROUNDING[dtype], 1e-5], strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other, rtol=rounding, atol=3e-6)


@pytest.mark.parametrize(("need_dx", "need_dweight"), [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients(need_dx: bool, need_dweight: bool) -> None:
    """Each alone is what it is together with the other; what is not wanted is not made."""
    x, dy, weight = random(40, 64), random(40, 64, seed=1), 1 + random(64, seed=2)
    _, scale = forward(x, weight, EPS)
    both = backward(dy, x, weight, scale)
    found = backward(dy, x, weight, scale, need_dx=need_dx, need_dweight=need_dweight)
    for one, other, wanted in zip(found, both, (need_dx, need_dweight), strict=True):
        assert torch.equal(one, other) if wanted else one is None


def test_rows_of_wider_rows() -> None:
    """A slice of a fused projection's columns, and of its heads, without a copy that would hide a wrong stride."""
    wide, grad = random(7, 2, 96), random(7, 2, 96, seed=1)
    weight = 1 + random(32, seed=2)
    for x, dy in ((wide[:, 0, 32:64], grad[:, 1, 64:]), (wide[..., :32], grad[..., 32:64])):
        y, scale = forward(x, weight, EPS)
        dx, dweight = backward(dy, x, weight, scale)
        for one, other in zip((y, scale, dx, dweight), exact(x, weight, dy), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=3e-6)


def test_rows_far_apart(far: Callable[[Tensor], Tensor]) -> None:
    """Beyond the reach of 32 bits."""
    x, dy, weight = random(3, 64, dtype=torch.bfloat16), random(3, 64, seed=1, dtype=torch.bfloat16), random(64, seed=2)
    y, scale = forward(far(x), weight, EPS)
    wanted = forward(x, weight, EPS)
    assert torch.equal(y, wanted[0])
    for given in ((far(dy), x), (dy, far(x))):
        for one, other in zip(backward(*given, weight, scale), backward(dy, x, weight, wanted[1]), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_made_again_bit_for_bit(dtype: torch.dtype) -> None:
    """By the kernel and by the plain lines that make it of the same scale."""
    x, weight = random(40, 48, dtype=dtype), 1 + random(48, seed=1)
    y, scale = forward(x, weight, EPS)
    assert torch.equal(recompute(x, weight, scale), y)
    assert torch.equal((x.float() * scale * weight).to(dtype), y)
    assert torch.equal(recompute(x, weight, 2 * scale), (x.float() * (2 * scale) * weight).to(dtype))


def test_no_rows() -> None:
    """Nothing in, nothing out, a weight's gradient of zero."""
    x, weight = random(0, 64), random(64)
    y, scale = forward(x, weight, EPS)
    dx, dweight = backward(x, x, weight, scale)
    assert (y.shape, scale.shape, dx.shape) == ((0, 64), (0, 1), (0, 64))
    assert torch.equal(dweight, torch.zeros(64))


def test_what_does_not_fit_is_refused() -> None:
    """Before a pointer is followed beyond its end, or digits are lost."""
    x, weight = random(4, 64), random(64)
    _, scale = forward(x, weight, EPS)
    for given, message in (
        ((x.double(), weight, EPS), "x is torch.float64; kernels take"),
        ((x, weight[:32], EPS), r"weight is \[32\]; expected \[64\]"),
        ((x, weight.to("meta"), EPS), "weight is on meta, the rest on cpu"),
        ((torch.empty(1, WIDEST + 1), torch.empty(WIDEST + 1), EPS), "rows of 65537 channels"),
    ):
        with pytest.raises(AssertionError, match=message):
            forward(*given)
    for given, message in (
        ((x[:3], x, weight, scale), r"dy is \[3, 64\]; expected \[4, 64\]"),
        ((x, x, weight, scale[:3]), r"scale is \[3, 1\]; expected \[4, 1\]"),
        ((x, x, weight, scale.double()), "scale is torch.float64"),
    ):
        with pytest.raises(AssertionError, match=message):
            backward(*given)
