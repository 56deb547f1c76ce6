"""Clocks of a device, and how fast it copies and multiplies."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from tools.benchmarking.ideal import copy_bandwidth
from tools.gpu_checks.check import Ground

_LEAST = 0.01  # the shortest time, in seconds, that is measured at once


def seconds_of(call: Callable[[], object], ground: Ground, repeats: int = 3) -> float:
    """Seconds of one call, the least of `repeats` attempts, without what the first calls compile."""
    device = ground.device
    if ground.tiny:
        return _timed(call, 1, device)
    call()
    count = max(1, min(round(_LEAST / max(_timed(call, 1, device), 1e-7)), 1000))
    return min(_timed(call, count, device) for _ in range(repeats)) / count


def replayed(call: Callable[[], object], ground: Ground) -> Callable[[], object]:
    """`call` recorded as a CUDA graph, so that the host's time does not count; on a CPU `call` itself."""
    if not ground.cuda:
        return call
    call()  # the first call compiles kernels, which cannot be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _timed(call: Callable[[], object], count: int, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait for all that a GPU has been given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def begin_peak(device: torch.device) -> int:
    """Free what nothing refers to and forget the highest allocation; returns the bytes allocated now."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_bytes(device: torch.device) -> int:
    """Most bytes that were allocated at once since `begin_peak`; 0 on a CPU, which does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


_copies: dict[torch.device, float] = {}


def copy_rate(ground: Ground) -> float:
    """Bytes/s, read and written; measured once a process."""
    if ground.device not in _copies:
        small = torch.ones(1 << 20, dtype=torch.uint8, device=ground.device)
        rate = 2 * small.nbytes / seconds_of(small.clone, ground) if ground.tiny else None
        _copies[ground.device] = rate or copy_bandwidth(ground.device)
    return _copies[ground.device]
