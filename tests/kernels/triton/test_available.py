"""When the kernels compute, and that nothing needs Triton."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from accessory import kernels
from accessory.errors import ConfigError
from accessory.kernels import triton
from accessory.kernels.operands import DTYPES
from accessory.kernels.triton import cross_entropy, four_bit, gate, group_codes, rms_norm, rotary

CPU = torch.device("cpu")


def forget() -> None:
    """As if nothing had been asked yet."""
    for cached in (kernels._fast, triton._tried, triton.interpreted):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    """Before and after."""
    forget()
    yield
    forget()


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_the_interpreter_the_cpu_computes(dtype: torch.dtype) -> None:
    """So that whole models can be tested with kernels."""
    assert triton.working(CPU, dtype) == set(triton.KERNELS)


def test_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, before others; a kernel that there is not is nobody's."""
    assert kernels.on("rms_norm", CPU, torch.bfloat16) is rms_norm
    assert kernels.on("document_attention", CPU, torch.bfloat16).__package__ == "accessory.kernels.plain"
    assert kernels.computing(CPU, torch.bfloat16) == "triton"
    monkeypatch.setenv("ACCESSORY_TRITON", "0")
    kernels._fast.cache_clear()
    assert kernels.on("rms_norm", CPU, torch.bfloat16).__package__ == "accessory.kernels.plain"
    assert kernels.computing(CPU, torch.bfloat16) == "plain"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8])
def test_other_dtypes_are_left_to_the_twins(dtype: torch.dtype) -> None:
    """Kernels would lose their digits."""
    assert not triton.working(CPU, dtype)


def test_other_devices_are_left_to_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors anyway, and a CPU without the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not triton.working(CPU, torch.bfloat16)
    assert not triton.working(torch.device("meta"), torch.bfloat16)


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 means never; a word is refused, and named."""
    monkeypatch.setenv("ACCESSORY_TRITON", "0")
    assert not triton.working(CPU, torch.bfloat16)
    monkeypatch.setenv("ACCESSORY_TRITON", "off")
    with pytest.raises(ConfigError, match=r"ACCESSORY_TRITON is 'off'; expected 1 .* or 0"):
        triton.working(CPU, torch.bfloat16)


def test_a_triton_that_cannot_compile_is_said(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Once for all kernels, with dtype and reason."""

    def broken(*_given: object, **_named: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    for module, function in ((rms_norm, "forward"), (gate, "forward"), (rotary, "rotate"), (four_bit, "dequantize"),
                             (group_codes, "dequantize"), (cross_entropy, "statistics")):  # fmt: skip
        monkeypatch.setattr(module, function, broken)
    monkeypatch.setattr(cross_entropy, "losses_and_gradient", broken)
    with caplog.at_level(logging.WARNING):
        assert [triton.working(CPU, torch.bfloat16) for _ in range(2)] == [frozenset(), frozenset()]
    assert [record.message for record in caplog.records] == [
        "Triton's cross_entropy, four_bit, gate, group_codes, rms_norm, rotary cannot be used in torch.bfloat16 on "
        "cpu, plain PyTorch computes: RuntimeError: Failed to find C compiler."
    ]
    assert kernels.computing(CPU, torch.bfloat16) == "plain"


def test_one_that_fails_in_one_dtype_is_said(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Plain PyTorch takes its place, in that dtype; the others stay."""
    right = rms_norm.forward

    def without_bf16(x: torch.Tensor, *given: object) -> tuple[torch.Tensor, torch.Tensor]:
        if x.dtype == torch.bfloat16:
            raise RuntimeError("type bf16 not supported in this architecture")
        return right(x, *given)

    monkeypatch.setattr(rms_norm, "forward", without_bf16)
    with caplog.at_level(logging.WARNING):
        assert kernels.on("rms_norm", CPU, torch.bfloat16).__package__ == "accessory.kernels.plain"
        assert kernels.on("rms_norm", CPU, torch.float32) is rms_norm
        assert kernels.on("gate", CPU, torch.bfloat16) is gate
    assert [record.message for record in caplog.records] == [
        "Triton's rms_norm cannot be used in torch.bfloat16 on cpu, plain PyTorch computes: "
        "RuntimeError: type bf16 not supported in this architecture"
    ]
    assert kernels.computing(CPU, torch.bfloat16) == "triton without rms_norm"
    assert kernels.computing(CPU, torch.float32) == "triton"


def test_one_that_computes_wrongly_is_said(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Every kernel's values are looked at, in the dtype that is asked for."""
    right = gate.forward
    monkeypatch.setattr(gate, "forward", lambda x, *given: right(x, *given) + (x.dtype == torch.float16))
    assert triton.working(CPU, torch.bfloat16) == set(triton.KERNELS)
    assert triton.working(CPU, torch.float16) == set(triton.KERNELS) - {"gate"}
    assert "Triton's gate cannot be used in torch.float16 on cpu" in caplog.text
    assert "the results of gate are wrong" in caplog.text


def test_nothing_needs_triton() -> None:
    """A model's parts import where it is not installed, and kernels, though wanted, are not available."""
    code = """
import sys
sys.modules["triton"] = None  # what importing it finds, and fails
import torch
import accessory.model.decoder
from accessory.kernels import triton
assert triton.interpreted() and not triton.working(torch.device("cpu"), torch.bfloat16)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
