"""The trial of a device: passes where kernels compute, and notices each that does not."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from accessory.kernels import triton
from accessory.kernels.trial import wrong_kernels

CPU = torch.device("cpu")


def found() -> list[str]:
    """What the trial finds wrong."""
    return wrong_kernels("triton", triton.KERNELS, CPU, torch.float32)


def test_right_kernels_pass() -> None:
    """Here, in the interpreter."""
    assert found() == []


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
