"""Checks of the kernels' arguments, before a call would read or write other memory."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.operands import check_shape

CPU = torch.device("cpu")


def contiguous(tensor: Tensor, shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`tensor`, contiguous. Raises `AssertionError` where shape, dtype or device are others."""
    check_shape(tensor, shape, name)
    check_numbers(tensor, name, dtype)
    return tensor.contiguous()


def check_numbers(tensor: Tensor, name: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Raises `AssertionError` for another dtype or device."""
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
