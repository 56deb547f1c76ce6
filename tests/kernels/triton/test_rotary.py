"""Rotary embedding against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accessory.kernels.operands import DTYPES
from accessory.kernels.triton import rotary
from accessory.model import position

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1.01 * 2**-8, torch.float16: 1.01 * 2**-11}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def unit_rotations(tokens: int, pairs: int) -> Tensor:
    """Rotations of `tokens` positions, some of them far."""
    frequencies = 100.0 ** (-torch.arange(pairs) / pairs)
    return position.rotations_at(frequencies, 37 * torch.arange(tokens))


def exact(x: Tensor, rotations: Tensor, layout: str) -> Tensor:
    """The rotation in float64, as two by two matrices."""
    half, y = rotations.shape[-1], x.double().clone()
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if layout == "pairs" else (slice(0, half), slice(half, 2 * half))
    )
    cosine, sine = rotations.real.double(), rotations.imag.double()
    a, b = x[..., first].double(), x[..., second].double()
    y[..., first], y[..., second] = a * cosine - b * sine, a * sine + b * cosine
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["pairs", "halves"])
@pytest.mark.parametrize(("heads", "width", "rotated"), [(2, 8, 8), (3, 20, 12), (1, 6, 2), (5, 80, 80)])
def test_equals_float64(heads: int, width: int, rotated: int, layout: str, dtype: torch.dtype) -> None:
    """Forward and back, whole heads and parts of them, numbers no power of two; the rest stays bit by bit."""
    x, forward = random(5, heads, width, dtype=dtype), unit_rotations(5, rotated // 2)
    for rotations in (forward, forward.conj()):
        found = rotary.rotate(x, rotations, layout)
        assert found.dtype == dtype
        wanted = exact(x, rotations, layout)
        torch.testing.assert_close(found.double(), wanted, rtol=ROUNDING[dtype], atol=1e-6)
        assert torch.equal(found[..., rotated:], x[..., rotated:])


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_more_channels_than_a_program_rotates(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Heads are shared out over programs, of which the last has fewer."""
    x, rotations = random(3, 5, 8), unit_rotations(3, 4)
    wanted = rotary.rotate(x, rotations, layout)
    monkeypatch.setattr(rotary, "CHANNELS", 16)
    assert torch.equal(rotary.rotate(x, rotations, layout), wanted)


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_strided(layout: str) -> None:
    """Heads within a fused projection, tokens that are adjacent, channels that are not."""
    before, rotations = random(4, 6, 8), unit_rotations(4, 3)
    heads = before[:, 1:4]
    found, wanted = rotary.rotate(heads, rotations, layout), exact(heads, rotations, layout)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    across = before.transpose(0, 1).contiguous().transpose(0, 1)  # tokens adjacent
    assert torch.equal(rotary.rotate(across, rotations, layout), rotary.rotate(before, rotations, layout))
    columns = before.transpose(1, 2).contiguous().transpose(1, 2)  # channels not adjacent
    assert torch.equal(rotary.rotate(columns, rotations, layout), rotary.rotate(before, rotations, layout))


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_tokens_far_apart(layout: str, far: Callable[[Tensor], Tensor]) -> None:
    """Beyond the reach of 32 bits."""
    x, rotations = random(3, 2, 8, dtype=torch.bfloat16), unit_rotations(3, 3)
    there = far(x)
    wanted = rotary.rotate(x, rotations, layout)
    assert torch.equal(rotary.rotate(there, rotations, layout), wanted)


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_heads_far_apart(layout: str, far: Callable[[Tensor], Tensor]) -> None:
    """As in a cache of long documents, head by head."""
    x, rotations = random(3, 2, 8, dtype=torch.bfloat16), unit_rotations(2, 3)
    there, beside = far(x).transpose(0, 1), x.transpose(0, 1)
    assert torch.equal(rotary.rotate(there, rotations, layout), rotary.rotate(beside, rotations, layout))


def test_no_tokens() -> None:
    """Nothing in, nothing out."""
    assert rotary.rotate(random(0, 2, 8), unit_rotations(0, 4)).shape == (0, 2, 8)


def test_what_does_not_fit_is_refused() -> None:
    """Before a pointer is followed beyond its end, or digits are lost."""
    x, rotations = random(4, 2, 8), unit_rotations(4, 4)
    for change, message in (
        ({"x": x.double()}, "x is torch.float64; kernels take"),
        ({"rotations": rotations[:3]}, r"rotations is \[3, 1, 4\]; expected \[4, 1, 4\]"),
        ({"rotations": rotations.to(torch.complex128)}, "rotations are torch.complex128"),
        ({"rotations": unit_rotations(4, 5)}, "of 10 channels; expected torch.complex64 of up to 8"),
        ({"rotations": rotations.to("meta")}, "rotations is on meta, the rest on cpu"),
        ({"layout": "quarters"}, "layout 'quarters'; known: pairs, halves"),
    ):
        with pytest.raises(AssertionError, match=message):
            rotary.rotate(**{"x": x, "rotations": rotations, **change})
