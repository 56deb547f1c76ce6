"""Tests of this CPU's kernels are skipped where it or its compiler cannot have them, and fail where they are wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from accessory.kernels import avx512
from accessory.kernels.avx512 import gate
from tests import cpu_kernels


@pytest.fixture(autouse=True)
def untried() -> Iterator[None]:
    """As if no kernel had been asked for, before and after."""
    forget()
    yield
    forget()


def forget() -> None:
    """What was found out so far."""
    for cached in (avx512._works, cpu_kernels.lacks):
        cached.cache_clear()
    cpu_kernels.forget()


def test_a_wrong_kernel_fails_its_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them: nobody knows what else the compiler got wrong."""
    cpu_kernels.require()
    avx512._works.cache_clear()
    right = gate.forward
    monkeypatch.setattr(gate, "forward", lambda *given: right(*given) + 1)
    with pytest.raises(pytest.fail.Exception, match="do not work: the results of gate are wrong"):
        cpu_kernels.require()


def test_kernels_that_do_not_compile_fail_their_tests(
    monkeypatch: pytest.MonkeyPatch, switch_cpu_kernels: Callable[[bool], None]
) -> None:
    """Where a compiler is there."""
    cpu_kernels.require()
    avx512._works.cache_clear()
    monkeypatch.setattr("accessory.kernels.avx512.gate.compiled", lambda *_given: 1 / 0)
    with pytest.raises(pytest.fail.Exception, match="do not work: ZeroDivisionError"):
        switch_cpu_kernels(True)


def test_another_machine_skips_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the processor, or without a compiler."""
    (tmp_path / "cpuinfo").write_text("flags : fpu avx512_bf16\n")
    monkeypatch.setattr(avx512, "CPU_INFORMATION", tmp_path / "cpuinfo")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    with pytest.raises(pytest.skip.Exception, match="/nowhere/c\\+\\+, is not on the PATH"):
        cpu_kernels.require()
    (tmp_path / "cpuinfo").write_text("flags : fpu avx512f\n")
    cpu_kernels.lacks.cache_clear()
    with pytest.raises(pytest.skip.Exception, match="no AVX512-bf16"):
        cpu_kernels.require()
