"""Kernels in C++ for CPUs with AVX512-bf16, compiled at first use: for steps that PyTorch does in many passes."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import torch

from accessory.kernels.switches import switched_on
from accessory.kernels.trial import fault_of

KERNELS = (
    "cached_attention",
    "column_sums",
    "cross_entropy",
    "document_attention",
    "four_bit_gemv",
    "four_bit_product",
    "gate",
    "group_codes",
    "group_codes_gemv",
    "group_codes_product",
    "rms_norm",
    "rotary",
)
CPU_INFORMATION = Path("/proc/cpuinfo")


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute in `dtype` on `device`. Raises `ConfigError` for an invalid ACCESSORY_AVX512."""
    here = device.type == "cpu" and dtype == torch.bfloat16
    return here and switched_on("ACCESSORY_AVX512", "C++ kernels") and _works()


@lru_cache
def _works() -> bool:
    """Every kernel is tried once: a compiler may be missing, too old, or wrong."""
    if not _processor_has_it():
        return False
    fault = fault_of("avx512", KERNELS, torch.device("cpu"), torch.bfloat16)
    if fault:
        logging.getLogger(__name__).warning(
            "This CPU's C++ kernels do not work, plain PyTorch computes: it trains in up to twice the time, and "
            "answers from weights of 4 bits and fewer in five times: %s",
            fault,
        )
    return not fault


def _processor_has_it() -> bool:
    try:
        return "avx512_bf16" in CPU_INFORMATION.read_text().split()
    except OSError:  # not Linux
        return False


__all__ = ["KERNELS", "available"]
