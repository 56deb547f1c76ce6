"""`--deterministic`: on CUDA, equal runs get equal bits, and so does a run that is stopped and resumed.

Without it, attention's gradient, and the results of a few operations of PyTorch, are summed in the order in which the
GPU's processors finish. A CPU sums in one order anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.deterministic

from accessory.errors import ConfigError

_CUBLAS, _IN_ORDER = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""cuBLAS's environment variable, and the values that fix the order of sums in products on every stream."""


def set_cublas_workspace() -> None:
    """Call it before CUDA starts: cuBLAS reads the variable once. Raises `ConfigError` for another value."""
    found = os.environ.setdefault(_CUBLAS, _IN_ORDER[0])
    if found not in _IN_ORDER:
        raise ConfigError(
            f"--deterministic: {_CUBLAS} is {found!r}, with which cuBLAS sums in no fixed order; expected "
            f"{' or '.join(_IN_ORDER)}, or nothing."
        )


@contextmanager
def algorithms_as_before() -> Iterator[None]:
    """Restore PyTorch's choice of algorithms at the end: left on, it could make later code raise."""
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        yield
    finally:
        if torch.are_deterministic_algorithms_enabled() != before:
            torch.use_deterministic_algorithms(before, warn_only=only_warned)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def fix_order_of_sums(wanted: bool, device: torch.device) -> list[str]:
    """From now on, if `wanted`, PyTorch sums in one order on CUDA, or raises; returns what to tell the user."""
    if device.type != "cuda":
        return ["--deterministic changes nothing here: a CPU sums in one order anyway"] if wanted else []
    if not wanted:
        return ["equal runs may differ in their last digits here, and so may a resumed one: see --deterministic"]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # our code writes such memory before it reads it
    return ["--deterministic: equal runs get equal bits on this GPU, with this torch; steps take longer"]
