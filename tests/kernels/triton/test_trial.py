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


def found(dtype: torch.dtype = torch.float32, names: tuple[str, ...] = triton.KERNELS) -> list[str]:
    """What the trial finds wrong."""
    return wrong_kernels("triton", names, CPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass(dtype: torch.dtype) -> None:
    """Here, in the interpreter; whatever the caller's modes are."""
    assert found(dtype) == []
    with FakeTensorMode():
        assert found(dtype) == []


def test_right_kernels_of_decoding_pass() -> None:
    """As rounded as they will be."""
    assert found(torch.bfloat16, triton.DECODING) == []


@pytest.mark.parametrize(
    ("kernel", "function"),
    [("rms_norm", "forward"), ("rms_norm", "backward"), ("gate", "forward"), ("gate", "backward"),
     ("rotary", "rotate"), ("four_bit", "dequantize"), ("group_codes", "dequantize"),
     ("cross_entropy", "losses_and_gradient"), ("decoding_attention", "attend"), ("decoding_groups", "multiply"),
     ("decoding_products", "multiply")],
)  # fmt: skip
def test_a_wrong_one_is_named(monkeypatch: pytest.MonkeyPatch, kernel: str, function: str) -> None:
    """One that is off by a hundredth."""
    module = import_module(f"accessory.kernels.triton.{kernel}")
    right = getattr(module, function)

    def off(*given, **more):
        result = right(*given, **more)
        results = result if isinstance(result, tuple) else (result,)
        wrong = tuple(None if part is None else 1.01 * part for part in results)
        return wrong if isinstance(result, tuple) else wrong[0]

    monkeypatch.setattr(module, function, off)
    assert found(names=triton.DECODING if kernel in triton.DECODING else triton.KERNELS) == [kernel]
