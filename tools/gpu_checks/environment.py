"""What the machine is, and how fast it is at best."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist

from accessory.kernels.bitsandbytes_library import AVAILABLE
from accessory.parallel.agree import highest
from accessory.parallel.groups import data_parallel_group, model_parallel_group
from tools.gpu_checks.check import Findings, Ground, check
from tools.gpu_checks.rates import copy_rate, seconds_of

PACKAGES = ("torch", "triton", "numpy", "bitsandbytes", "fairscale", "pydantic", "fire", "gguf", "safetensors",
            "tokenizers", "sentencepiece", "transformers", "peft")  # fmt: skip
KNOWN = {"H200": (4.3e12, 790e12), "H100": (2.9e12, 650e12), "A100": (1.7e12, 250e12)}
"""Part of a GPU's name -> bytes/s of a copy and FLOP/s of a bf16 product, as measured on such cards."""
SHARE = 0.7  # share of these rates; below it, something slows the GPU down


@check(1)
def versions(ground: Ground, found: Findings) -> None:
    """Versions, the card, and bitsandbytes' library for it."""
    found.figures |= {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    found.expect(AVAILABLE, "bitsandbytes found no library of its own for this machine")
    if not ground.cuda:
        return
    properties = torch.cuda.get_device_properties(ground.device)
    free, total = torch.cuda.mem_get_info(ground.device)
    found.figures |= {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(total / 1e9, 1),
        "free_gb": round(free / 1e9, 1),
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "driver": _driver(),
    }
    found.expect(torch.cuda.is_bf16_supported(), "the card does not compute in bf16")
    some = torch.ones(1 << 20, device=ground.device)
    grows = any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
    found.figures |= {"expandable_segments": grows, "uuid": str(properties.uuid), "sum": int(some.sum())}


@check(2, needs_cuda=True)
def copies(ground: Ground, found: Findings) -> None:
    """Copies on the card, and between it and pinned memory of the host."""
    rate = copy_rate(ground)
    found.figures["copy_gb_per_s"] = round(rate / 1e9, 1)
    _compare(ground, found, rate, 0, "a copy")
    numbers = torch.randint(0, 255, (ground.pick(1 << 28, 1 << 16),), dtype=torch.uint8)
    host = numbers.pin_memory() if ground.cuda else numbers
    there, back = torch.empty_like(host, device=ground.device), torch.empty_like(host, pin_memory=ground.cuda)
    to = seconds_of(lambda: there.copy_(host, non_blocking=True), ground)
    away = seconds_of(lambda: back.copy_(there, non_blocking=True), ground)
    found.figures |= {
        "to_device_gb_per_s": round(host.nbytes / to / 1e9, 1),
        "to_host_gb_per_s": round(host.nbytes / away / 1e9, 1),
    }
    found.expect(torch.equal(back, numbers), "what came back from the device is not what went there")


@check(2)
def collectives(ground: Ground, found: Findings) -> None:
    """Tensors of the card go through NCCL, those of the host through gloo, also where there is one rank."""
    for device in {ground.device, torch.device("cpu")}:
        for group in (None, model_parallel_group(), data_parallel_group()):
            numbers = torch.arange(5.0, device=device)
            dist.all_reduce(numbers, group=group)
            found.expect(numbers.tolist() == [0, 1, 2, 3, 4], f"a sum over one rank on {device} is {numbers.tolist()}")
    found.expect(highest([3, 1]) == [3, 1], "ranks cannot agree")
    found.figures["backend"] = dist.get_backend_config()


@check(1, needs_cuda=True)
def products(ground: Ground, found: Findings) -> None:
    """A square product in bf16: its rate, and some rows of it against float64."""
    side = ground.pick(8192, 64)
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=ground.device) for _ in range(2))
    rate = 2 * side**3 / seconds_of(lambda: a @ b, ground)
    found.figures["tflop_per_s"] = round(rate / 1e12, 1)
    _compare(ground, found, rate, 1, "a product in bf16")
    rows = slice(side // 2, side // 2 + 8)
    found.close("rows of a product", (a @ b)[rows], a[rows].cpu().double() @ b.cpu().double(), 4e-3)


def _compare(ground: Ground, found: Findings, rate: float, which: int, what: str) -> None:
    """Fault a card that is slower than others of its name."""
    if not ground.cuda or ground.tiny:
        return
    name = torch.cuda.get_device_properties(ground.device).name
    usual = next((rates[which] for part, rates in KNOWN.items() if part in name), None)
    if usual is not None:
        found.expect(rate > SHARE * usual, f"{what} has {rate:.3g}/s; cards of this name had {usual:.3g}/s")


def _version(package: str) -> str | None:
    """The installed version; a folder without metadata is only known to be there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "found" if find_spec(package) else None


def _driver() -> str | None:
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0] if file.is_file() else None


CHECKS = [versions, copies, products, collectives]
