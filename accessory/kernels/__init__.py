"""Kernels for steps that plain PyTorch makes several passes over memory of: in Triton, and in C++ for a CPU (`avx512`).

Each is the counterpart of plain lines elsewhere, which compute wherever `chosen` gives none: for Triton's on a CPU,
without Triton, where it cannot compile, in other dtypes, or when ACCESSORY_TRITON=0. So nothing needs Triton or a
compiler, and nothing here imports it before it is used. Under Triton's interpreter (TRITON_INTERPRET=1, set before
anything imports Triton) its kernels run on the CPU, slowly, to be tested.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from accessory.kernels import avx512
from accessory.kernels.switches import switched_on

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels read and write; inside they compute in fp32, which would lose digits of anything wider."""
KERNELS = ("cross_entropy", "four_bit", "gate", "rms_norm", "rotary")


def __getattr__(name: str) -> ModuleType:
    if name in KERNELS:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def chosen(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The kernel `name` that computes in `dtype` on `device`, Triton's or this CPU's; None: plain PyTorch does.

    Raises `ConfigError` for a strange ACCESSORY_TRITON or ACCESSORY_AVX512.
    """
    if device.type == "cpu" and not interpreted():
        found = name in avx512.KERNELS and avx512.available(device, dtype)
        return _module(f"{avx512.__name__}.{name}") if found else None
    return _module(f"{__name__}.{name}") if name in KERNELS and available(device, dtype) else None


def computing(device: torch.device, dtype: torch.dtype) -> str:
    """Which of them compute in `dtype` on `device`: triton, avx512, or none."""
    if available(device, dtype):
        return "triton"
    return "avx512" if not interpreted() and avx512.available(device, dtype) else "none"


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton's kernels compute in `dtype` on `device`. Raises `ConfigError` for a strange ACCESSORY_TRITON."""
    # Triton launches on the current device and its stream, wherever the tensors are.
    here = device.index == torch.cuda.current_device() if device.type == "cuda" else interpreted()
    return here and dtype in DTYPES and switched_on("ACCESSORY_TRITON", "Triton's kernels") and _works(device)


@lru_cache  # Triton asks once too
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_module = lru_cache(import_module)  # which takes longer to look a module up than some kernels to compute


@lru_cache
def _works(device: torch.device) -> bool:
    """Every kernel is tried once: Triton needs a C compiler, Python's headers and a GPU of these years."""
    if find_spec("triton") is None:
        return False
    try:
        wrong = import_module(f"{__name__}.trial").wrong_kernels(device)
        fault = f"the results of {', '.join(wrong)} are wrong" if wrong else ""
    except Exception as error:  # whatever a compiler, a linker or a driver may raise
        fault = f"{type(error).__name__}: {str(error).strip()}"
    if fault:
        logging.getLogger(__name__).warning("Triton does not work on %s, plain PyTorch computes: %s", device, fault)
    return not fault


__all__ = ["DTYPES", "KERNELS", "available", "chosen", "computing", "interpreted"]
