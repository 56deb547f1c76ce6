"""The inner steps of a model, each with up to three implementations that have the same functions and signatures.

`plain` is PyTorch's and computes anything anywhere. `triton` is for GPUs, `avx512`, in C++, for CPUs with AVX512-bf16:
they read and write memory once where plain PyTorch does several times. `of` gives the best one there is. Nothing needs
Triton or a compiler, and neither is touched before it is used: where it is missing, fails or computes wrongly, or is
switched off by ACCESSORY_TRITON=0 or ACCESSORY_AVX512=0, `plain` computes. Products with 4-bit codes have no `plain`:
their callers unpack the codes and multiply.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from accessory.kernels import avx512, triton

_KNOWN = {"triton": triton.KERNELS, "avx512": avx512.KERNELS, "plain": ()}


def of(name: str, x: Tensor, *case: object) -> ModuleType:
    """The implementation of the kernel `name` for x: see `on`."""
    return on(name, x.device, x.dtype, *case)


def on(name: str, device: torch.device, dtype: torch.dtype, *case: object) -> ModuleType:
    """The implementation of the kernel `name` that computes in `dtype` on `device`: plain PyTorch's as the last resort.

    case: arguments of `takes`, by which an implementation refuses what it cannot compute: an activation, a head's
    width. Raises `ConfigError` for an invalid ACCESSORY_TRITON or ACCESSORY_AVX512.
    """
    return fast(name, device, dtype, *case) or _implementation("plain", name)


def fast(name: str, device: torch.device, dtype: torch.dtype, *case: object) -> ModuleType | None:
    """The same if it is not plain PyTorch's, else None: for callers with another way of their own."""
    if device.type == "cuda" and not _is_current(device):
        return None
    found = _fast(name, device, dtype)
    return None if found is None or (case and not found.takes(*case)) else found


def decoding_kernels(device: torch.device, dtype: torch.dtype) -> tuple[ModuleType, ModuleType] | None:
    """(products, attention): the kernels that decode in few launches, in `dtype` on `device`; None: there are none."""
    products, attention = (decoding_kernel(name, device, dtype) for name in ("decoding_products", "decoding_attention"))
    return None if products is None or attention is None else (products, attention)


def decoding_kernel(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """One of Triton's kernels that only decoding uses, if it computes in `dtype` on `device`."""
    if device.type == "cuda" and not _is_current(device):
        return None
    return _implementation("triton", name) if name in triton.working(device, dtype, triton.DECODING) else None


def _is_current(device: torch.device) -> bool:
    # Triton launches on the current device and its stream, wherever the tensors are.
    return torch.cuda.is_initialized() and device.index == torch.cuda.current_device()


def computing(device: torch.device, dtype: torch.dtype) -> str:
    """Which implementations compute in `dtype` on `device`, where they have the kernel: triton, avx512 or plain.

    Behind it stand the names of its kernels that cannot be used there.
    """
    package, working = _working(device, dtype)
    lacking = [name for name in _KNOWN[package] if name not in working]
    return f"{package} without {', '.join(lacking)}" if lacking else package


def _working(device: torch.device, dtype: torch.dtype) -> tuple[str, Collection[str]]:
    """A package, and those of its kernels that can be used."""
    if working := triton.working(device, dtype):
        return "triton", working
    if not triton.interpreted() and avx512.available(device, dtype):
        return "avx512", avx512.KERNELS
    return "plain", ()


@lru_cache  # while decoding, the questions take longer than some kernels
def _fast(name: str, device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    package, working = _working(device, dtype)
    return _implementation(package, name) if name in working else None


@lru_cache
def _implementation(package: str, name: str) -> ModuleType:
    return import_module(f"{__name__}.{package}.{name}")


__all__ = ["computing", "decoding_kernel", "decoding_kernels", "fast", "of", "on"]
