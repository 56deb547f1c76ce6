"""The trial of a device: passes where kernels compute, and notices each that does not."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from accessory.kernels import triton
from accessory.kernels.operands import DTYPES
from accessory.kernels.trial import wrong_kernels

CPU = torch.device("cpu")


def found(dtype: torch.dtype = torch.float32) -> list[str]:
    """What the trial finds wrong."""
    return wrong_kernels("triton", triton.KERNELS, CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    """Here, in the interpreter; whatever the caller's modes are."""
    assert found(dtype) == []
    with FakeTensorMode():
        assert found(dtype) == []


@pytest.mark.parametrize(
    ("kernel", "function"),
    [("rms_norm", "forward"), ("rms_norm", "backward"), ("gate", "forward"), ("gate", "backward"),
     ("rotary", "rotate"), ("four_bit", "dequantize"), ("group_codes", "dequantize"),
     ("cross_entropy", "statistics")],
)  # fmt: skip
def test_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch, kernel: str, function: str) -> None:
    """One that is off by a hundredth."""
    module = import_module(f"accessory.kernels.triton.{kernel}")
    right = getattr(module, function)

    def off(*given, **more):
        result = right(*given, **more)
        return tuple(1.01 * part for part in result) if isinstance(result, tuple) else 1.01 * result

    monkeypatch.setattr(module, function, off)
    assert found() == [kernel]
