"""This CPU's C++ kernels in tests: skipped where a machine lacks what they need, never where they are wrong."""

from __future__ import annotations

import subprocess
from functools import lru_cache

import pytest
import torch

from accessory import kernels
from accessory.kernels import avx512
from accessory.kernels.avx512.compiling import FLAGS, CannotCompile, _compiler
from accessory.kernels.trial import fault_of

CPU = torch.device("cpu")


@lru_cache
def lacks() -> str:
    """What this machine has not: the processor, or a compiler that knows it; empty where it has both."""
    if not avx512._processor_has_it():
        return "no AVX512-bf16"
    try:
        command = [*_compiler(), *(flag for flag in FLAGS if flag.startswith("-m")), "-E", "-xc++", "/dev/null"]
    except CannotCompile as error:
        return str(error)
    return "" if subprocess.run(command, capture_output=True).returncode == 0 else "a compiler without AVX512-bf16"


def require() -> None:
    """Skip the test where they cannot be there, fail it where they are and do not work."""
    if lacks():
        pytest.skip(lacks())
    if not avx512.available(CPU, torch.bfloat16):
        pytest.fail(f"they do not work: {fault_of('avx512', avx512.KERNELS, CPU, torch.bfloat16) or 'switched off'}")


def forget() -> None:
    """Ask again which kernels compute: the environment has changed."""
    kernels._fast.cache_clear()
