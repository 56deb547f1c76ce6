"""What a kernel may be given. A pointer has no bounds and fp32 no more digits: faults must show before the launch."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels import DTYPES


def check_floats(**tensors: Tensor) -> None:
    """Raises `AssertionError` for one in a dtype kernels do not compute in, or on another device than the first."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise AssertionError(f"{name} is {tensor.dtype}; kernels take {', '.join(map(str, DTYPES))}")
        check_device(device, **{name: tensor})


def check_device(device: torch.device, **tensors: Tensor) -> None:
    """Raises `AssertionError` for one that lies elsewhere."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise AssertionError(f"{name} is on {tensor.device}, the rest on {device}")


def check_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raises `AssertionError` for a tensor that has not `shape`."""
    if tuple(tensor.shape) != tuple(shape):
        raise AssertionError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D] whose columns are adjacent; a view where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for the interpreter on a CPU, two, so that work is shared out there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
