"""The rotation in plain PyTorch against float64, and what it takes on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from accessory.kernels.plain import rotary
from accessory.kernels.plain.rotary import rotate
from accessory.model.position import rotations_at
from tests.kernels.operations import Operations

LAYOUTS = ["pairs", "halves"]


def given() -> tuple[Tensor, Tensor]:
    """Queries [37, 3, 20], and rotations of their first 12 channels."""
    frequencies = 100.0 ** (-torch.arange(6) / 6)
    return torch.randn(37, 3, 20, generator=torch.Generator().manual_seed(0)), rotations_at(
        frequencies, torch.arange(37)
    )


def exact(x: Tensor, rotations: Tensor, layout: str) -> Tensor:
    """In float64, as two by two matrices."""
    y, half = x.double().clone(), rotations.shape[-1]
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if layout == "pairs" else (slice(0, half), slice(half, 2 * half))
    )
    cosine, sine = rotations.real.double(), rotations.imag.double()
    a, b = x[..., first].double(), x[..., second].double()
    y[..., first], y[..., second] = a * cosine - b * sine, a * sine + b * cosine
    return y


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_back(layout: str, dtype: torch.dtype) -> None:
    """By rotations and by their conjugates."""
    x, rotations = given()
    x = x.to(dtype)
    for turn in (rotations, rotations.conj()):
        wanted = exact(x, turn, layout)
        torch.testing.assert_close(rotate(x, turn, layout).double(), wanted, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_cuda_a_conjugate_is_not_copied(layout: str) -> None:
    """It is divided by what it is the conjugate of, which gives the same but for rounding."""
    x, rotations = given()
    formula = getattr(rotary, f"_rotate_{layout}")
    with FakeTensorMode(), torch.no_grad():
        queries = torch.empty(37, 3, 12, dtype=torch.bfloat16, device="cuda")
        turn = torch.empty(37, 1, 6, dtype=torch.complex64, device="cuda")
        with Operations() as seen:
            formula(queries, turn.conj())
    assert "clone" not in seen.names and ("div" if layout == "pairs" else "roll") in seen.names
    pairs = torch.view_as_complex(x[..., :12].unflatten(-1, (-1, 2)).contiguous())
    torch.testing.assert_close(pairs / rotations, pairs * rotations.conj(), rtol=1e-6, atol=1e-6)
