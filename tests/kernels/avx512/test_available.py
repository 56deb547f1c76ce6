"""When C++ kernels compute, and that nothing needs a compiler."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from accessory import kernels
from accessory.errors import ConfigError
from accessory.kernels import avx512
from accessory.kernels.avx512 import compiling, gate
from accessory.kernels.plain import gate as plain_gate
from tests.kernels.formulas import ON_THEIR_OWN

CPU = torch.device("cpu")
HERE = avx512._processor_has_it()
needs_processor = pytest.mark.skipif(not HERE, reason="no AVX512-bf16")


def forget() -> None:
    """As if no kernel had been asked for yet."""
    for cached in (kernels._fast, avx512._works, compiling.compiled, compiling.compiled_library):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    """Before and after."""
    forget()
    yield
    forget()


@needs_processor
def test_where_they_compute() -> None:
    """bf16 on the CPU."""
    assert avx512.available(CPU, torch.bfloat16)
    assert not any(avx512.available(CPU, dtype) for dtype in (torch.float16, torch.float32, torch.float64))
    assert not any(avx512.available(torch.device(other), torch.bfloat16) for other in ("meta", "cuda"))
    for dtype, package in ((torch.bfloat16, "avx512"), (torch.float32, "plain")):
        names = set(avx512.KERNELS) - ON_THEIR_OWN
        assert {kernels.on(name, CPU, dtype).__name__ for name in names} == {
            f"accessory.kernels.{package}.{name}" for name in names
        }
        assert all((kernels.fast(name, CPU, dtype) is None) == (package == "plain") for name in ON_THEIR_OWN)
    assert kernels.on("four_bit", CPU, torch.bfloat16).__name__ == "accessory.kernels.plain.four_bit"
    assert kernels.computing(CPU, torch.bfloat16) == "avx512"
    assert kernels.computing(CPU, torch.float32) == "plain"


@needs_processor
def test_cases_that_they_do_not_know_are_plain() -> None:
    """Another activation, an odd head, several new tokens a document, wide angles."""
    for name, known, unknown in (
        ("gate", "silu", "gelu"),
        ("document_attention", 64, 7),
        ("cached_attention", 1, 2),
        ("rotary", torch.complex64, torch.complex128),
    ):
        x = torch.empty(0, dtype=torch.bfloat16)
        found = [kernels.of(name, x, case).__name__ for case in (known, unknown)]
        assert found == [f"accessory.kernels.{package}.{name}" for package in ("avx512", "plain")]


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 means never; a word is refused, and named."""
    monkeypatch.setenv("ACCESSORY_AVX512", "0")
    assert kernels.on("gate", CPU, torch.bfloat16) is plain_gate
    kernels._fast.cache_clear()
    monkeypatch.setenv("ACCESSORY_AVX512", "off")
    with pytest.raises(ConfigError, match=r"ACCESSORY_AVX512 is 'off'; expected 1 .* or 0"):
        kernels.on("gate", CPU, torch.bfloat16)


@pytest.mark.parametrize("information", ["flags : fpu avx512f avx512_bf16x avx2\n", None])
def test_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, information: str | None, caplog) -> None:
    """Is not told that it lacks something, nor is anything compiled for it."""
    if information:
        (tmp_path / "cpuinfo").write_text(information)
    monkeypatch.setattr(avx512, "CPU_INFORMATION", tmp_path / "cpuinfo")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert not avx512.available(CPU, torch.bfloat16)
    assert not caplog.records


@needs_processor
def test_without_a_compiler_it_is_said_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog) -> None:
    """And what to install."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with caplog.at_level(logging.WARNING):
        assert [avx512.available(CPU, torch.bfloat16) for _ in range(2)] == [False, False]
    (record,) = caplog.records
    assert record.message.startswith("This CPU's C++ kernels do not work, plain PyTorch computes")
    assert record.message.endswith("none of g++, clang++, c++ is on the PATH; install g++")


@needs_processor
def test_kernels_that_compute_wrongly_are_said(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    """Every kernel's values are looked at."""
    right = gate.forward
    monkeypatch.setattr(gate, "forward", lambda *given: right(*given) + 1)
    assert not avx512.available(CPU, torch.bfloat16)
    assert "the results of gate are wrong" in caplog.text


def test_nothing_needs_a_compiler() -> None:
    """A block computes where there is none."""
    code = """
import torch
from accessory.model.feed_forward import gate
from accessory.model.position import rotate
x = torch.ones(3, 4, 8, dtype=torch.bfloat16)
assert gate(x, x).value.isfinite().all()
assert torch.equal(rotate(x, torch.ones(3, 1, 4, dtype=torch.complex64)), x)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={"PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
