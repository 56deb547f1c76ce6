"""Kernels in Triton for GPUs.

Under Triton's interpreter (TRITON_INTERPRET=1, set before anything imports Triton) they run on the CPU, slowly, to be
tested.
"""

from __future__ import annotations

import logging
import os
from functools import lru_cache
from importlib.util import find_spec

import torch

from accessory.kernels.operands import DTYPES
from accessory.kernels.switches import switched_on
from accessory.kernels.trial import fault_of

KERNELS = ("cross_entropy", "four_bit", "gate", "group_codes", "rms_norm", "rotary")


def available(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compute in `dtype` on `device`. Raises `ConfigError` for an invalid ACCESSORY_TRITON."""
    here = device.type == "cuda" or (device.type == "cpu" and interpreted())
    return here and dtype in DTYPES and switched_on("ACCESSORY_TRITON", "Triton's kernels") and _works(device)


@lru_cache  # Triton asks once too
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _works(device: torch.device) -> bool:
    """Every kernel is tried once: Triton needs a C compiler, Python's headers and a recent GPU."""
    if find_spec("triton") is None:
        return False
    fault = fault_of("triton", KERNELS, device, torch.float32)
    if fault:
        logging.getLogger(__name__).warning("Triton does not work on %s, plain PyTorch computes: %s", device, fault)
    return not fault


__all__ = ["KERNELS", "available", "interpreted"]
