"""Sums over rows in C++ against float64."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels.avx512.column_sums import column_sums


@pytest.mark.parametrize("shape", [(300, 64), (7, 200), (1, 3), (0, 10)])
def test_equals_float64(threads: int, shape: tuple[int, int]) -> None:
    """Summed in fp32, slices of wider rows too."""
    x = torch.randn(shape[0], shape[1] + 5, generator=torch.Generator().manual_seed(0)).bfloat16()[:, 5:]
    found = column_sums(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
