"""Checks of kernels' arguments: kernels read by address and compute in fp32, so errors must be found before."""

from __future__ import annotations

import torch
from torch import Tensor

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels read and write; inside they compute in fp32, which would lose digits of anything wider."""


def check_floats(**tensors: Tensor) -> None:
    """Raises `AssertionError` for one in a dtype kernels do not compute in, or on another device than the first."""
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise AssertionError(f"{name} is {tensor.dtype}; kernels take {', '.join(map(str, DTYPES))}")
    check_device(device, **tensors)


def check_device(device: torch.device, **tensors: Tensor) -> None:
    """Raises `AssertionError` for one that lies elsewhere."""
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise AssertionError(f"{name} is on {tensor.device}, the rest on {device}")


def check_shape(tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
    """Raises `AssertionError` for a tensor that has not `shape`."""
    if tensor.shape != shape:
        raise AssertionError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")


def check_scores(scores: Tensor, local: Tensor, width: int | None, **statistics: Tensor) -> int:
    """How many columns of scores [c, V] are not padding: `width`, if there is one.

    Raises `AssertionError` for scores that overlap or whose columns are apart, for labels that are not int64 [c], and
    for statistics that are not fp32 [c].
    """
    check_floats(scores=scores)
    columns = scores.shape[1]
    if scores.stride(1) != 1 or (scores.stride(0) < columns and len(scores) > 1):
        raise AssertionError(
            f"scores' strides are {scores.stride()}; expected adjacent columns, and rows for themselves"
        )
    check_device(scores.device, local=local, **statistics)
    for name, tensor in {"local": local, **statistics}.items():
        check_shape(tensor, (len(scores),), name)
        dtype = torch.float32 if name in statistics else torch.int64
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise AssertionError(f"{name} is {tensor.dtype}, strides {tensor.stride()}; expected {dtype}, contiguous")
    if width is not None and width < 0:
        raise AssertionError(f"width {width}; expected 0 or more")
    return columns if width is None else min(width, columns)


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D] whose columns are adjacent; a view where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for the interpreter on a CPU, two, so that work is shared out there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def contiguous(tensor: Tensor, shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`tensor`, contiguous, for C++. Raises `AssertionError` for another shape, dtype, or device than the CPU."""
    check_shape(tensor, shape, name)
    check_numbers(tensor, name, dtype)
    return tensor.contiguous()


def as_fp32(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """A bias or LoRA factor in fp32, contiguous. Raises `AssertionError` for another shape or device than the CPU."""
    return contiguous(tensor.to(torch.float32), shape, name, torch.float32)


def check_numbers(tensor: Tensor, name: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raises `AssertionError` for another dtype, or device than the CPU."""
    if tensor.dtype != dtype or not tensor.is_cpu:
        raise AssertionError(f"{name} is {tensor.dtype} on {tensor.device}; expected {dtype} on the cpu")


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Memory for a result, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=dtype, device=CPU)


def address(tensor: Tensor | None) -> int | None:
    """Where it begins. Raises `AssertionError` for one without memory."""
    if tensor is None:
        return None
    place = tensor.data_ptr()
    if not place and tensor.numel():
        raise AssertionError("a tensor without memory, as under torch's FakeTensorMode; kernels need numbers")
    return place
