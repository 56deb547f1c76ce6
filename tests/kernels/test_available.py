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

CPU = torch.device("cpu")


def forget() -> None:
    """As if nothing had been asked yet."""
    kernels._works.cache_clear()
    kernels.interpreted.cache_clear()


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    """Before and after."""
    forget()
    yield
    forget()


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_under_the_interpreter_the_cpu_computes(dtype: torch.dtype) -> None:
    """So that whole models can be tested with kernels."""
    assert kernels.available(CPU, dtype)


def test_they_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, before others; a kernel that there is not is nobody's."""
    assert kernels.chosen("rms_norm", CPU, torch.bfloat16) is kernels.rms_norm
    assert kernels.chosen("document_attention", CPU, torch.bfloat16) is None
    assert kernels.computing(CPU, torch.bfloat16) == "triton"
    monkeypatch.setenv("ACCESSORY_TRITON", "0")
    assert kernels.chosen("rms_norm", CPU, torch.bfloat16) is None
    assert kernels.computing(CPU, torch.bfloat16) == "none"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8])
def test_other_dtypes_are_left_to_the_twins(dtype: torch.dtype) -> None:
    """Kernels would lose their digits."""
    assert not kernels.available(CPU, dtype)


def test_other_devices_are_left_to_the_twins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors anyway, and a CPU without the interpreter."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert not kernels.available(CPU, torch.bfloat16)
    assert not kernels.available(torch.device("meta"), torch.bfloat16)


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 means never; a word is refused, and named."""
    monkeypatch.setenv("ACCESSORY_TRITON", "0")
    assert not kernels.available(CPU, torch.bfloat16)
    monkeypatch.setenv("ACCESSORY_TRITON", "off")
    with pytest.raises(ConfigError, match=r"ACCESSORY_TRITON is 'off'; expected 1 .* or 0"):
        kernels.available(CPU, torch.bfloat16)


def test_a_triton_that_cannot_compile_is_said(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Once, with the reason."""

    def broken(*_given: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels.rms_norm, "forward", broken)
    with caplog.at_level(logging.WARNING):
        assert [kernels.available(CPU, torch.bfloat16) for _ in range(2)] == [False, False]
    assert [record.message for record in caplog.records] == [
        "Triton does not work on cpu, plain PyTorch computes: RuntimeError: Failed to find C compiler."
    ]


def test_a_triton_that_computes_wrongly_is_said(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Every kernel's values are looked at."""
    right = kernels.gate.forward
    monkeypatch.setattr(kernels.gate, "forward", lambda *given: right(*given) + 1)
    assert not kernels.available(CPU, torch.bfloat16)
    assert "the results of gate are wrong" in caplog.text


def test_unknown_kernels() -> None:
    """An attribute error, as of any module."""
    with pytest.raises(AttributeError, match="no attribute 'softmax'"):
        kernels.softmax  # noqa: B018


def test_nothing_needs_triton() -> None:
    """A model's parts import where it is not installed, and kernels, though wanted, are not available."""
    code = """
import sys
sys.modules["triton"] = None  # what importing it finds, and fails
import torch
import accessory.model.decoder
from accessory import kernels
assert kernels.interpreted() and not kernels.available(torch.device("cpu"), torch.bfloat16)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
