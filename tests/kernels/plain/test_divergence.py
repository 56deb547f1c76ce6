"""The divergence of rows of logits and its gradient, against autograd through float64's formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.plain import divergence
from accessory.kernels.plain.divergence import divergences_and_gradient, workspace


def logits(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A student's and a teacher's."""
    generator = torch.Generator().manual_seed(0)
    return tuple((3 * torch.randn(rows, columns, generator=generator).double()).to(dtype) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("width", [None, 29])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)]
)
def test_equals_float64(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, width: int | None, temperature: float
) -> None:
    """Some rows at a time; padding counts for nothing, however high it is, and the student's logits stay."""
    monkeypatch.setattr(divergence, "_AT_ONCE", 31 * 8)
    scores, wanted = logits(20, 31, dtype)
    own = scores.double()[:, :width].requires_grad_()
    p, q = ((each / temperature).log_softmax(1) for each in (wanted.double()[:, :width], own))
    exact = temperature**2 * F.kl_div(q, p, log_target=True, reduction="none").sum(1)
    (gradient,) = torch.autograd.grad(exact.sum(), own)
    if width:
        scores[:, width:], wanted[:, width:] = 1000, -1000
    before = scores.clone()
    found = divergences_and_gradient(scores, wanted, temperature, width)
    assert torch.equal(scores, before) and found.dtype == torch.promote_types(dtype, torch.float32)
    assert (found.double() - exact).abs().max() < min(tolerance, 1e-5) * exact.max()
    assert (wanted[:, :width].double() - gradient).norm() < tolerance * gradient.norm()
    assert width is None or not wanted[:, width:].any()


def test_nothing_diverges_from_itself() -> None:
    """Rounding leaves hardly a distance or gradient; and of no rows there is none."""
    scores, _ = logits(5, 300, torch.bfloat16)
    wanted = scores.clone()
    assert divergences_and_gradient(scores, wanted).abs().max() < 1e-6 and wanted.abs().max() < 1e-7
    assert divergences_and_gradient(scores[:0], wanted[:0], work=workspace(scores)).shape == (0,)


def test_a_difference_far_below_bf16s_steps_is_kept() -> None:
    """The gradient is rounded once, and not each of the two distributions of which it is the difference."""
    scores, _ = logits(4, 300, torch.float64)
    wanted = scores + 1e-4 * torch.randn(4, 300, generator=torch.Generator().manual_seed(1)).double()
    exact = (scores.softmax(1) - wanted.softmax(1)).float()
    narrow = wanted.float()
    divergences_and_gradient(scores.float(), narrow)
    assert (narrow - exact).norm() < 0.01 * exact.norm()
