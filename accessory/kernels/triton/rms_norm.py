"""RMSNorm (Zhang & Sennrich 2019): one pass over memory in each direction, fp32 inside, one number a row kept."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.operands import as_rows, check_device, check_floats, check_shape, processors

WIDEST = 1 << 16  # channels whose row a program still holds in registers


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] and weight [D] -> x / rms(x) * weight in x's dtype, for no gradient."""
    return forward(x, weight, eps)[0]


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, and 1 / rms(x) fp32 [..., 1]."""
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return _launch_forward(x, weight, scale, eps, known=False), scale


def recompute(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The forward's result, bit by bit, from the scale that it returned."""
    return _launch_forward(x, weight, scale, 0.0, known=True)


def _launch_forward(x: Tensor, weight: Tensor, scale: Tensor, eps: float, *, known: bool) -> Tensor:
    check_floats(x=x, weight=weight)
    _check_row_parts(x, weight, scale)
    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if rows.numel():
        tile = _tile(rows.shape[1])
        grid, sizes = (triton.cdiv(len(rows), tile["ROWS"]),), (len(rows), rows.shape[1], rows.stride(0))
        _forward[grid](rows, weight.contiguous(), y, scale.contiguous(), *sizes, eps, KNOWN=known, **tile)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, need_dx: bool = True, need_dweight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dx in x's dtype and dweight in weight's, None where not needed; `scale` [..., 1] is the forward's.

    The weight's gradient is summed in fixed order, so that equal runs stay equal.
    """
    check_floats(x=x, dy=dy, weight=weight)
    check_shape(dy, x.shape, "dy")
    _check_row_parts(x, weight, scale)
    rows, grads = as_rows(x), as_rows(dy)
    count, width = rows.shape
    tile = _tile(width)
    programs = triton.cdiv(count, tile["ROWS"])
    if need_dweight:
        # As many programs as run at once, each with its own sum over many rows: few sums are left to add.
        programs = min(programs, processors(x.device) * max(16 // tile["num_warps"], 1))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_dx else None
    sums = torch.empty((programs, width), dtype=torch.float32, device=x.device) if need_dweight else None
    if rows.numel() and (need_dx or need_dweight):
        _backward[(programs,)](
            grads,
            rows,
            weight.contiguous(),
            scale.contiguous(),
            rows if dx is None else dx,
            scale if sums is None else sums,
            count,
            width,
            grads.stride(0),
            rows.stride(0),
            triton.cdiv(count, programs * tile["ROWS"]),
            DX=need_dx,
            DWEIGHT=need_dweight,
            **tile,
        )
    return dx, None if sums is None else sums.sum(0).to(weight.dtype)


def _check_row_parts(x: Tensor, weight: Tensor, scale: Tensor) -> None:
    check_shape(weight, x.shape[-1:], "weight")
    check_shape(scale, (*x.shape[:-1], 1), "scale")
    check_device(x.device, scale=scale)
    if scale.dtype != torch.float32:
        raise AssertionError(f"scale is {scale.dtype}; expected the forward's torch.float32")


def _tile(width: int) -> dict[str, int]:
    """Rows and channels of a program, and its warps: 16 values a thread fit its registers; narrow rows share it."""
    if width > WIDEST:
        raise AssertionError(f"rows of {width} channels; the kernels hold up to {WIDEST}")
    block = triton.next_power_of_2(width)
    return {"ROWS": max(2048 // block, 1), "BLOCK": block, "num_warps": min(max(block // 512, 4), 32)}


@triton.jit
def _forward(
    x, weight, y, scale, rows, width, stride, eps, KNOWN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * stride + column[None, :], inside, other=0).to(tl.float32)
    if KNOWN:
        inverse = tl.load(scale + row, row < rows, other=0)
    else:
        inverse = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
        tl.store(scale + row, inverse, row < rows)
    factor = tl.load(weight + column, column < width, other=0).to(tl.float32)
    result = value * inverse[:, None] * factor[None, :]
    tl.store(y + row[:, None] * width + column[None, :], result.to(y.dtype.element_ty), inside)


@triton.jit
def _backward(
    dy,
    x,
    weight,
    scale,
    dx,
    sums,
    rows,
    width,
    dy_stride,
    x_stride,
    steps,
    DX: tl.constexpr,
    DWEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, BLOCK)
    factor = tl.load(weight + column, column < width, other=0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS
    for step in range(steps):
        row = first + step * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], inside, other=0).to(tl.float32)
        value = tl.load(x + row[:, None] * x_stride + column[None, :], inside, other=0).to(tl.float32)
        inverse = tl.load(scale + row, row < rows, other=0)[:, None]
        unit = value * inverse
        if DWEIGHT:
            total += grad * unit
        if DX:
            dunit = grad * factor[None, :]
            along = tl.sum(dunit * unit, 1)[:, None] / width
            result = (dunit - unit * along) * inverse
            tl.store(dx + row[:, None] * width + column[None, :], result.to(dx.dtype.element_ty), inside)
    if DWEIGHT:
        place = sums + tl.program_id(0).to(tl.int64) * width + column
        tl.store(place, tl.sum(total, 0), column < width)
