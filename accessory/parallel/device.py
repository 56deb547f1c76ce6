"""Which device a process computes on, and why PyTorch sees no GPU where there seems to be one."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from accessory.errors import ParallelError

CPU = torch.device("cpu")
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the name now, and the name until torch 2.9
_VIRTUAL_MEMORY = 102  # CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED of cuda.h
_DRIVER = Path("/proc/driver/nvidia/version")
_DEVICES = Path("/dev")
_LEAST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}
"""CUDA's major version -> the first driver that runs all of its minor ones (NVIDIA, CUDA Compatibility)."""


def choose_device(name: str, local_rank: int) -> torch.device:
    """`auto` is CUDA if PyTorch sees a GPU, else the CPU; stderr then says why, if the machine has an NVIDIA driver.

    A process that is shown one GPU takes it: `srun --gpus-per-task=1` shows each task its own. Raises `ParallelError`
    for a device that is not there.
    """
    kind, _, number = name.partition(":")
    if kind not in ("auto", "cpu", "cuda") or not (number or "0").isdecimal() or (number and kind != "cuda"):
        raise ParallelError(f"--device {name!r} is not one of auto, cpu, cuda.")
    if kind == "cpu":
        return CPU
    _let_segments_grow()
    with warnings.catch_warnings(record=True) as caught:  # hidden, because `why_no_gpu` says the same, and what to do
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        why = why_no_gpu(" ".join(str(warning.message).split("(Triggered")[0].strip() for warning in caught))
        if kind == "cuda":
            raise ParallelError(f"--device cuda: {why or 'PyTorch sees no CUDA device here'}. Use --device cpu.")
        if why and local_rank == 0 and not _all_hidden():
            print(f"warning: --device auto takes the CPU: {why}.", file=sys.stderr, flush=True)
        return CPU
    visible = torch.cuda.device_count()
    place = int(number) if number else 0 if visible == 1 else local_rank
    if place >= visible:
        raise ParallelError(f"Local rank {place} has no GPU: {visible} visible. Start fewer processes per node.")
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def check_own_device(device: torch.device, store: dist.Store, rank: int, world_size: int) -> None:
    """Raise `ParallelError`, on all ranks, if two of them have the same GPU: NCCL would say only "invalid usage"."""
    if device.type != "cuda" or world_size == 1:
        return
    own = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"gpu-{rank}", own)
    owner: dict[str, int] = {}
    for other in range(world_size):
        gpu = store.get(f"gpu-{other}").decode()
        if gpu in owner:
            raise ParallelError(
                f"Ranks {owner[gpu]} and {other} have the same GPU, on {gpu.split()[0]}. Start no more processes a "
                "node than it has GPUs; under srun, --gpus-per-task=1 shows each its own.",
                common=True,
            )
        owner[gpu] = other


def why_no_gpu(warned: str = "") -> str | None:
    """Why PyTorch sees no GPU though this machine has an NVIDIA driver; None where it has none.

    warned: PyTorch's own warning, which is reported if no better reason is known.
    """
    driver, files = _driver_version(), list(_DEVICES.glob("nvidia[0-9]*"))
    if driver is None and not files:
        return None
    named = f"there is an NVIDIA driver{f' ({driver})' if driver else ''}, but"
    built = torch.version.cuda
    if built is None:
        return f"{named} this PyTorch ({torch.__version__}) was built without CUDA; get another from pytorch.org"
    if _all_hidden():
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}, which hides all GPUs"
    runs, major = _driver_cuda(), int(built.split(".")[0])
    if runs and runs[0] < major:
        least = _LEAST_DRIVER.get(major)
        return (
            f"the NVIDIA driver ({driver or 'of unknown version'}) runs CUDA {runs[0]}.{runs[1]} and is too old for "
            f"this PyTorch ({torch.__version__}), built for CUDA {built}: install driver "
            f"{least + ' or later' if least else 'for CUDA ' + built}, or a PyTorch for CUDA {runs[0]}"
        )
    if not files:
        return f"{named} no /dev/nvidia0: start the container with --gpus all, or the job with a GPU"
    return f"{named} PyTorch cannot start CUDA{f' ({warned})' if warned else ''}; look at nvidia-smi"


def _all_hidden() -> bool:
    """Whether the user hides all GPUs."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles")


def _driver_version() -> str | None:
    with suppress(OSError):
        found = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text(encoding="utf-8"))
        return found[1] if found else None
    return None


def _driver_cuda() -> tuple[int, int] | None:
    """The CUDA version that the driver runs, as its library says."""
    with suppress(OSError, AttributeError):
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
            return number.value // 1000, number.value % 1000 // 10
    return None


def _let_segments_grow() -> None:
    """Let CUDA's memory grow in place, so that tensors of changing sizes leave no gaps. Call it before CUDA starts.

    A user's setting is kept. Some virtual GPUs cannot let memory grow in place.
    """
    if torch.version.cuda and not any(name in os.environ for name in _ALLOCATOR) and _maps_memory():
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def _maps_memory() -> bool:
    """Whether the first GPU has virtual memory management, as the driver's library says."""
    found = ctypes.c_int()
    with suppress(OSError, AttributeError):
        cuda = ctypes.CDLL("libcuda.so.1")
        if cuda.cuInit(0) == 0:
            cuda.cuDeviceGetAttribute(ctypes.byref(found), _VIRTUAL_MEMORY, 0)
    return found.value == 1
