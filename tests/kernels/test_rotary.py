"""Rotary embedding against float64, and beside its plain twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accessory.kernels import DTYPES, rotary
from accessory.model import position

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1.01 * 2**-8, torch.float16: 1.01 * 2**-11}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def turns(tokens: int, pairs: int) -> Tensor:
    """Rotations of `tokens` positions, some of them far."""
    frequencies = 100.0 ** (-torch.arange(pairs) / pairs)
    return position.rotations(frequencies, 37 * torch.arange(tokens))


def exact(x: Tensor, turn: Tensor, layout: str, inverse: bool = False) -> Tensor:
    """The rotation in float64, as two by two matrices."""
    half, y = turn.shape[-1], x.double().clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if layout == "pairs" else (slice(0, half), slice(half, 2 * half))
    )
    cosine, sine = turn.real.double(), turn.imag.double() * (-1 if inverse else 1)
    a, b = x[..., first].double(), x[..., second].double()
    y[..., first], y[..., second] = a * cosine - b * sine, a * sine + b * cosine
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["pairs", "halves"])
@pytest.mark.parametrize(("heads", "width", "turned"), [(2, 8, 8), (3, 20, 12), (1, 6, 2), (5, 80, 80)])
def test_equals_float64(heads: int, width: int, turned: int, layout: str, dtype: torch.dtype) -> None:
    """Forward and back, whole heads and parts of them, numbers no power of two; what is not turned stays bit by bit."""
    x, turn = random(5, heads, width, dtype=dtype), turns(5, turned // 2)
    for inverse in (False, True):
        found = rotary.rotate(x, turn, layout, inverse=inverse)
        assert found.dtype == dtype
        wanted = exact(x, turn, layout, inverse)
        torch.testing.assert_close(found.double(), wanted, rtol=ROUNDING[dtype], atol=1e-6)
        assert torch.equal(found[..., turned:], x[..., turned:])


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_more_channels_than_a_program_turns(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Heads are shared out over programs, of which the last has fewer."""
    x, turn = random(3, 5, 8), turns(3, 4)
    wanted = rotary.rotate(x, turn, layout)
    monkeypatch.setattr(rotary, "CHANNELS", 16)
    assert torch.equal(rotary.rotate(x, turn, layout), wanted)


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_in_place_and_strided(layout: str) -> None:
    """Heads within a fused projection are turned where they are, and nothing beside them."""
    wide, turn = random(4, 6, 8), turns(4, 3)
    before = wide.clone()
    heads = wide[:, 1:4]
    assert rotary.rotate(heads, turn, layout, out=heads) is heads
    torch.testing.assert_close(heads.double(), exact(before[:, 1:4], turn, layout), rtol=1e-6, atol=1e-6)
    wide[:, 1:4] = before[:, 1:4]
    assert torch.equal(wide, before)
    across = before.transpose(0, 1).contiguous().transpose(0, 1)  # tokens adjacent
    assert torch.equal(rotary.rotate(across, turn, layout), rotary.rotate(before, turn, layout))
    columns = before.transpose(1, 2).contiguous().transpose(1, 2)  # channels not adjacent
    assert torch.equal(rotary.rotate(columns, turn, layout), rotary.rotate(before, turn, layout))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_beside_the_twin(monkeypatch: pytest.MonkeyPatch, layout: str, dtype: torch.dtype) -> None:
    """Value and gradient of the plain rotation."""
    monkeypatch.setenv("ACCESSORY_TRITON", "0")
    x, turn = random(5, 3, 16, dtype=dtype), turns(5, 6)
    leaf = x.clone().requires_grad_()
    wanted = position.rotate(leaf, turn, layout)
    wanted.backward(x)
    tolerance = {"rtol": 2 * ROUNDING[dtype], "atol": 1e-6}
    torch.testing.assert_close(rotary.rotate(x, turn, layout), wanted.detach(), **tolerance)
    torch.testing.assert_close(rotary.rotate(x, turn, layout, inverse=True), leaf.grad, **tolerance)
    torch.testing.assert_close(rotary.rotate(x, turn.conj(), layout), leaf.grad, **tolerance)


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_tokens_far_apart(layout: str, far: Callable[[Tensor], Tensor]) -> None:
    """Beyond the reach of 32 bits, read and written."""
    x, turn = random(3, 2, 8, dtype=torch.bfloat16), turns(3, 3)
    there = far(x)
    wanted = rotary.rotate(x, turn, layout)
    assert torch.equal(rotary.rotate(there, turn, layout), wanted)
    assert torch.equal(rotary.rotate(there, turn, layout, out=there), wanted)


def test_no_tokens() -> None:
    """Nothing in, nothing out."""
    assert rotary.rotate(random(0, 2, 8), turns(0, 4)).shape == (0, 2, 8)


def test_what_does_not_fit_is_refused() -> None:
    """Before a pointer is followed beyond its end, or digits are lost."""
    x, turn = random(4, 2, 8), turns(4, 4)
    for change, message in (
        ({"x": x.double()}, "x is torch.float64; kernels take"),
        ({"turn": turn[:3]}, r"turn is \[3, 1, 4\]; expected \[4, 1, 4\]"),
        ({"turn": turn.to(torch.complex128)}, "turn is torch.complex128"),
        ({"turn": turns(4, 5)}, "of 10 channels; expected torch.complex64 of up to 8"),
        ({"turn": turn.to("meta")}, "turn is on meta, the rest on cpu"),
        ({"layout": "quarters"}, "layout 'quarters'; known: pairs, halves"),
        ({"out": x[:, :1]}, r"out is \[4, 1, 8\]; expected \[4, 2, 8\]"),
        ({"out": x.bfloat16()}, "out is torch.bfloat16"),
        ({"out": torch.empty(4, 2, 16)[..., ::2]}, "adjacent channels"),
    ):
        with pytest.raises(AssertionError, match=message):
            rotary.rotate(**{"x": x, "turn": turn, **change})
