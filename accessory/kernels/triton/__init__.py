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
from accessory.kernels.trial import faults_of

KERNELS = ("cross_entropy", "four_bit", "gate", "group_codes", "rms_norm", "rotary")
DECODING = ("decoding_attention", "decoding_groups", "decoding_products")
"""Kernels that are tried when the first answer is asked for: a training run does not wait for their compiler."""


def working(device: torch.device, dtype: torch.dtype, names: tuple[str, ...] = KERNELS) -> frozenset[str]:
    """Those of the kernels `names` that compute in `dtype` on `device`.

    Raises `ConfigError` for an invalid ACCESSORY_TRITON.
    """
    here = device.type == "cuda" or (device.type == "cpu" and interpreted())
    wanted = here and dtype in DTYPES and switched_on("ACCESSORY_TRITON", "Triton's kernels")
    return _tried(device, dtype, names) if wanted else frozenset()


@lru_cache  # Triton asks once too
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache
def _tried(device: torch.device, dtype: torch.dtype, names: tuple[str, ...]) -> frozenset[str]:
    """Every kernel is tried once in each dtype: Triton needs a C compiler, Python's headers and a recent GPU.

    Kernels that fail with the same error are logged in one line.
    """
    if find_spec("triton") is None:
        return frozenset()
    faults = faults_of("triton", names, device, dtype)
    for fault in dict.fromkeys(faults.values()):
        faulty = ", ".join(name for name, its in faults.items() if its == fault)
        logging.getLogger(__name__).warning(
            "Triton's %s cannot be used in %s on %s, plain PyTorch computes: %s", faulty, dtype, device, fault
        )
    return frozenset(names) - faults.keys()


__all__ = ["DECODING", "KERNELS", "interpreted", "working"]
