"""Checks of kernels' arguments: kernels read by address and compute in fp32, so errors must be found before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Reduce = Callable[[Tensor, Literal["max", "sum"]], None]
"""Replaces each rank's tensor by the maximum, or the sum, over all ranks."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels read and write; inside they compute in fp32, which would lose digits of anything wider."""


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
    if tensor.shape != shape:
        raise AssertionError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")


def check_scores(scores: Tensor, local: Tensor, width: int | None) -> int:
    """How many columns of scores [c, V] are not padding: `width`, if there is one.

    Raises `AssertionError` for scores that overlap or whose columns are apart, and for labels that are not int64 [c].
    """
    check_device(scores.device, local=local)
    check_shape(local, (len(scores),), "local")
    columns = scores.shape[1]
    if scores.stride(1) != 1 or (scores.stride(0) < columns and len(scores) > 1):
        raise AssertionError(
            f"scores' strides are {scores.stride()}; expected adjacent columns, and rows for themselves"
        )
    if local.dtype != torch.int64 or not local.is_contiguous():
        raise AssertionError(f"local is {local.dtype}, strides {local.stride()}; expected torch.int64, contiguous")
    if width is not None and width < 0:
        raise AssertionError(f"width {width}; expected 0 or more")
    return columns if width is None else min(width, columns)


def check_of_rows(scores: Tensor, **tensors: Tensor) -> None:
    """Raises `AssertionError` for one that is not a number in fp32 for each row of `scores`."""
    for name, tensor in tensors.items():
        check_shape(tensor, (len(scores),), name)
        check_device(scores.device, **{name: tensor})
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise AssertionError(f"{name} is {tensor.dtype}, strides {tensor.stride()}; expected float32, contiguous")


def combine_statistics(highest: Tensor, mass: Tensor, target: Tensor, reduce: Reduce | None) -> None:
    """Turn statistics of this rank's slice of the vocabulary into those of all slices, in place."""
    if reduce is None:
        return
    mine = highest.clone()
    reduce(highest, "max")
    mass *= (mine - highest).exp()
    reduce(mass, "sum")
    reduce(target, "sum")


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [rows, D] whose columns are adjacent; a view where that can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for the interpreter on a CPU, two, so that work is shared out there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
