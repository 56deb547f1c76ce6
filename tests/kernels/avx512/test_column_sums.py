"""Sums over rows in C++ against float64."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels.avx512.column_sums import column_sums


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("shape", [(300, 64), (7, 200), (1, 3), (0, 10)])
def test_equals_float64(shape: tuple[int, int]) -> None:
    """Summed in fp32, slices of wider rows too."""
    x = torch.randn(shape[0], shape[1] + 5, generator=torch.Generator().manual_seed(0)).bfloat16()[:, 5:]
    found = column_sums(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)


def test_small_numbers_after_many() -> None:
    """No long sum swallows them."""
    found = column_sums(torch.full((100_000, 1), 0.1, dtype=torch.bfloat16))
    assert float(found) == pytest.approx(100_000 * float(torch.tensor(0.1).bfloat16()), rel=1e-5)
