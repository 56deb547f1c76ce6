"""The gate of a feed-forward layer (Shazeer 2020): act(x) * up and its gradient, each in one pass, fp32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.operands import as_rows, check_floats, check_shape

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
BLOCK = 2048  # values of one program: two loads of 16 bytes a thread from each operand in bf16


def takes(activation: str) -> bool:
    """Whether `activation` is among those that are known."""
    return activation in ACTIVATIONS


def forward(x: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(x) * up, both [..., F], in x's dtype. Rows may be slices of wider ones."""
    (y,) = _launch(_forward, activation, 1, x=x, up=up)
    return y


def backward(dy: Tensor, x: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dx, dup) of `forward`, in x's dtype."""
    dx, dup = _launch(_backward, activation, 2, x=x, up=up, dy=dy)
    return dx, dup


def _launch(kernel: triton.JITFunction, activation: str, results: int, **operands: Tensor) -> list[Tensor]:
    """Run `kernel` over operands of one shape; returns as many new tensors as it makes."""
    if activation not in ACTIVATIONS:
        raise AssertionError(f"activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    check_floats(**operands)
    x = operands["x"]
    for name, tensor in operands.items():
        check_shape(tensor, x.shape, name)
    made = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(results)]
    # Contiguous operands are one long row, whose loads are aligned whatever F is.
    whole = all(tensor.is_contiguous() for tensor in operands.values())
    rows = [tensor.view(1, -1) if whole else as_rows(tensor) for tensor in operands.values()]
    count, width = rows[0].shape
    if x.numel():
        blocks = triton.cdiv(width, BLOCK)
        strides = [row.stride(0) for row in rows]
        kernel[(count * blocks,)](
            *rows, *made, width, blocks, *strides, ACTIVATION=activation, BLOCK=BLOCK, num_warps=4
        )
    return made


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    """act(x) and its derivative; what is not used of them is not computed."""
    if ACTIVATION == "silu":
        share = 1 / (1 + tl.exp(-x))
        return x * share, share * (1 + x * (1 - share))
    elif ACTIVATION == "gelu":
        share = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * share, share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(u)) / 2 is the logistic function of 2u
        share = 1 / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        slope = 1.5957691216057308 * (1 + 0.134145 * x * x)
        return x * share, share + x * share * (1 - share) * slope
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(x < 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)  # NaN stays NaN


@triton.jit
def _span(width, blocks, BLOCK: tl.constexpr):
    """Row, columns and mask of this program."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < width


@triton.jit
def _forward(x, up, y, width, blocks, x_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row, column, inside = _span(width, blocks, BLOCK)
    gate = tl.load(x + row * x_stride + column, inside, other=0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, inside, other=0).to(tl.float32)
    value, _slope = _activated(gate, ACTIVATION)
    tl.store(y + row * width + column, (value * factor).to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    x, up, dy, dx, dup, width, blocks, x_stride, up_stride, dy_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, inside = _span(width, blocks, BLOCK)
    gate = tl.load(x + row * x_stride + column, inside, other=0).to(tl.float32)
    factor = tl.load(up + row * up_stride + column, inside, other=0).to(tl.float32)
    grad = tl.load(dy + row * dy_stride + column, inside, other=0).to(tl.float32)
    value, slope = _activated(gate, ACTIVATION)
    tl.store(dx + row * width + column, (grad * factor * slope).to(dx.dtype.element_ty), inside)
    tl.store(dup + row * width + column, (grad * value).to(dup.dtype.element_ty), inside)
