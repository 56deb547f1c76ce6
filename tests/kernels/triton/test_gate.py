"""The gate against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.operands import DTYPES
from accessory.kernels.plain import gate as plain
from accessory.kernels.triton.gate import ACTIVATIONS, BLOCK, backward, forward

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.01 * 2**-8, torch.float16: 1.01 * 2**-11}


def operands(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Random x, up and dy; x's tails are long."""
    generator = torch.Generator().manual_seed(0)
    return [(scale * torch.randn(shape, generator=generator)).to(dtype) for scale in (4, 1, 1)]


def exact(x: Tensor, up: Tensor, dy: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dup in float64."""
    x, up = x.double().requires_grad_(), up.double().requires_grad_()
    y = FUNCTIONS[activation](x) * up
    y.backward(dy.double())
    return y.detach(), x.grad, up.grad


def test_every_activation_of_a_feed_forward_layer_is_known() -> None:
    """Or the first model with another would end here."""
    assert set(ACTIVATIONS) == set(FUNCTIONS) == set(plain.ACTIVATIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, BLOCK + 24)])
def test_equals_float64(shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    """Only the results are rounded; less than a program's share, and several with an odd end."""
    x, up, dy = operands(shape, dtype)
    found = (forward(x, up, activation), *backward(dy, x, up, activation))
    for one, other in zip(found, exact(x, up, dy, activation), strict=True):
        assert one.dtype == dtype
        assert one.shape == shape
        torch.testing.assert_close(one.double(), other, rtol=ROUNDING[dtype], atol=2e-6)


def test_slices_of_one_product() -> None:
    """x and up side by side in a fused projection's rows."""
    wide = torch.randn(7, 26, generator=torch.Generator().manual_seed(1))
    x, up, dy = wide[:, :13], wide[:, 13:], wide[:, 5:18]
    found = (forward(x, up, "silu"), *backward(dy, x, up, "silu"))
    for one, other in zip(found, exact(x, up, dy, "silu"), strict=True):
        assert one.is_contiguous()
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)


def test_rows_far_apart(far: Callable[[Tensor], Tensor]) -> None:
    """Beyond the reach of 32 bits."""
    x, up, dy = operands((3, 24), torch.bfloat16)
    wanted = (forward(x, up, "silu"), *backward(dy, x, up, "silu"))
    for given in ((far(x), up, dy), (x, far(up), dy), (x, up, far(dy))):
        found = (forward(*given[:2], "silu"), *backward(given[2], *given[:2], "silu"))
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_values(activation: str) -> None:
    """No overflow on either side, and NaN is not lost."""
    x = torch.tensor([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    one = torch.ones_like(x)
    found = (forward(x, one, activation), *backward(one, x, one, activation))
    for got, wanted in zip(found, exact(x, one, one, activation), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-7)
    assert forward(torch.tensor([torch.nan]), one[:1], activation).isnan()


def test_nothing_to_do() -> None:
    """Nothing in, nothing out."""
    empty = torch.empty(0, 8)
    assert [t.shape for t in (forward(empty, empty, "silu"), *backward(empty, empty, empty, "silu"))] == [(0, 8)] * 3


def test_what_does_not_fit_is_refused() -> None:
    """Before a pointer is followed beyond its end, or digits are lost."""
    x = torch.ones(3, 4)
    for given, message in (
        ((x.double(), x, "silu"), "x is torch.float64; kernels take"),
        ((x, x[:2], "silu"), r"up is \[2, 4\]; expected \[3, 4\]"),
        ((x, x.to("meta"), "silu"), "up is on meta, the rest on cpu"),
        ((x, x, "swish"), "activation 'swish'; known: silu, gelu, gelu_tanh, relu"),
    ):
        with pytest.raises(AssertionError, match=message):
            forward(*given)
    with pytest.raises(AssertionError, match=r"dy is \[3, 2\]; expected \[3, 4\]"):
        backward(x[:, :2], x, x, "silu")
