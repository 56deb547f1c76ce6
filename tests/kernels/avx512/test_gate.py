"""The gate in C++ against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.avx512.gate import ACTIVATIONS, backward, forward

ROUNDING = 1.01 * 2**-8


def operands(*shape: int) -> list[Tensor]:
    """Random x, up and dy; x's tails are long."""
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(shape, generator=generator)).bfloat16() for scale in (4, 1, 1)]


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(3, 5), (2, 4096 + 24), (0, 8)])
def test_equals_float64(shape: tuple[int, ...]) -> None:
    """Only the results are rounded."""
    x, up, dy = operands(*shape)
    wide = [t.double().requires_grad_() for t in (x, up)]
    y = F.silu(wide[0]) * wide[1]
    wanted = y.detach(), *torch.autograd.grad(y, wide, dy.double())
    for one, other in zip((forward(x, up, "silu"), *backward(dy, x, up, "silu")), wanted, strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one.double(), other, rtol=ROUNDING, atol=2e-6)


def test_far_from_zero() -> None:
    """Where powers overflow and vanish, and what is not finite."""
    x = torch.tensor([-3e38, -1000, -90, -0.0, 90, 1000, 3e38, torch.nan, torch.inf]).bfloat16()
    one = torch.ones_like(x)
    torch.testing.assert_close(forward(x, one, "silu"), F.silu(x), equal_nan=True, rtol=ROUNDING, atol=0)
    dx, dup = backward(one, x, one, "silu")
    leaf = x.float().requires_grad_()
    (wanted,) = torch.autograd.grad(F.silu(leaf).sum(), leaf)
    torch.testing.assert_close(dx[:-1].float(), wanted[:-1], equal_nan=True, rtol=ROUNDING, atol=1e-30)
    torch.testing.assert_close(dup, F.silu(x), equal_nan=True, rtol=ROUNDING, atol=0)


def test_slices() -> None:
    """Of wider rows."""
    x, up, dy = (t[:, 3:40] for t in operands(4, 64))
    assert torch.equal(forward(x, up, "silu"), forward(x.clone(), up.clone(), "silu"))
    assert all(map(torch.equal, backward(dy, x, up, "silu"), backward(dy.clone(), x.clone(), up.clone(), "silu")))


def test_others_are_not_known() -> None:
    """An error, not a wrong number."""
    assert ACTIVATIONS == ("silu",)
    with pytest.raises(AssertionError, match="activation 'gelu'; known: silu"):
        forward(*operands(2, 2)[:2], "gelu")
