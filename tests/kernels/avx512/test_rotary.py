"""Rotations in C++ against complex numbers in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.kernels.avx512.rotary import rotate


def operands(tokens: int, heads: int, width: int, half: int) -> tuple[Tensor, Tensor]:
    """Random heads and angles."""
    generator = torch.Generator().manual_seed(0)
    angles = 10 * torch.randn(tokens, 1, half, generator=generator)
    return torch.randn(tokens, heads, width, generator=generator).bfloat16(), torch.polar(torch.ones(()), angles)


def exact(x: Tensor, rotations: Tensor, layout: str) -> Tensor:
    """Channel pairs as complex numbers."""
    half = rotations.shape[-1]
    rotated, rest = x.double().split([2 * half, x.shape[-1] - 2 * half], -1)
    a, b = rotated.chunk(2, -1) if layout == "halves" else rotated.unflatten(-1, (-1, 2)).unbind(-1)
    c = torch.complex(a, b) * rotations.to(torch.complex128)
    parts = [c.real, c.imag] if layout == "halves" else [torch.view_as_real(c).flatten(-2)]
    return torch.cat([*parts, rest], -1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", ["pairs", "halves"])
@pytest.mark.parametrize("width", [(64, 32), (128, 64), (20, 3), (80, 40), (96, 24), (2, 1), (8, 0)])
def test_equals_float64(width: tuple[int, int], layout: str) -> None:
    """Only the result is rounded; heads rotated whole, in part, and not at all."""
    x, rotations = operands(9, 3, *width)
    found = rotate(x, rotations, layout)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact(x, rotations, layout), rtol=1.01 * 2**-8, atol=1e-5)


@pytest.mark.parametrize("layout", ["pairs", "halves"])
def test_a_conjugate_turns_back(layout: str) -> None:
    """Whether it is one by name only or by its numbers."""
    x, rotations = operands(9, 3, 64, 32)
    found = rotate(x, rotations.conj(), layout)
    assert torch.equal(found, rotate(x, rotations.conj().resolve_conj(), layout))
    torch.testing.assert_close(found.double(), exact(x, rotations.conj(), layout), rtol=1.01 * 2**-8, atol=1e-5)


def test_slices() -> None:
    """Heads of a wider projection, and no tokens."""
    x, rotations = operands(5, 6, 32, 16)
    assert torch.equal(rotate(x[:, 1::2], rotations, "halves"), rotate(x, rotations, "halves")[:, 1::2])
    assert rotate(x[:0], rotations[:0]).shape == (0, 6, 32)


def test_other_layouts_are_not_known() -> None:
    """An error, not a wrong number."""
    with pytest.raises(AssertionError, match="layout 'thirds'; known: pairs, halves"):
        rotate(*operands(2, 2, 8, 4), "thirds")
