"""Every Triton kernel against the formula that all implementations are held to."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from accessory.kernels import triton
from tests.kernels.formulas import check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", triton.KERNELS)
def test_equals_float64(name: str, dtype: torch.dtype) -> None:
    """In both widths."""
    check(name, import_module(f"accessory.kernels.triton.{name}"), dtype)
