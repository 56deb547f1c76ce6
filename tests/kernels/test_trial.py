"""The trial of a device: passes where kernels compute, and notices each that does not."""

from __future__ import annotations

import pytest
import torch

from accessory import kernels
from accessory.kernels.trial import wrong_kernels

CPU = torch.device("cpu")


def test_right_kernels_pass() -> None:
    """Here, in the interpreter."""
    assert wrong_kernels(CPU) == []


@pytest.mark.parametrize(
    ("kernel", "function"),
    [("rms_norm", "forward"), ("rms_norm", "backward"), ("gate", "forward"), ("gate", "backward"),
     ("rotary", "rotate"), ("four_bit", "dequantize"), ("cross_entropy", "statistics")],
)  # fmt: skip
def test_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch, kernel: str, function: str) -> None:
    """One that is off by a hundredth."""
    module = getattr(kernels, kernel)
    right = getattr(module, function)

    def off(*given, **more):
        found = right(*given, **more)
        return tuple(1.01 * part for part in found) if isinstance(found, tuple) else 1.01 * found

    monkeypatch.setattr(module, function, off)
    assert wrong_kernels(CPU) == [kernel]
