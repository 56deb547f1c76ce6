"""A row's statistics against float64; the loss and gradient are tested in tests/model/test_loss.py."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels.plain.cross_entropy import statistics
from tests.kernels.scores import problem


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [None, 29, 0])
def test_statistics_equal_float64(dtype: torch.dtype, width: int | None) -> None:
    """Of a slice that begins with token 7, whole, with padding above any score, and of padding alone."""
    scores, labels = problem(6, 30, dtype)
    kept = 30 if width is None else width
    exact = scores.double()[:, :kept]
    scores[:, kept:] = 100.0
    mine = (labels >= 7) & (labels < 7 + kept)
    highest, mass, target = statistics(scores.clone(), torch.where(mine, labels - 7, -1), width)
    assert highest.dtype == torch.promote_types(dtype, torch.float32)
    wanted = exact.amax(1) if kept else torch.full((6,), -torch.inf).double()
    assert torch.equal(highest.double(), wanted)
    torch.testing.assert_close(mass.double(), (exact - wanted[:, None]).exp().sum(1), rtol=1e-6, atol=0)
    found = [scores.double()[row, label - 7].item() if there else 0 for row, (label, there) in
             enumerate(zip(labels.tolist(), mine.tolist(), strict=True))]  # fmt: skip
    assert target.tolist() == found
    assert (kept == 0) != any(mine)
