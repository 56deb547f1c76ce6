"""Products of a few rows with matrices of 2, 3 and 4-bit numbers in groups, LoRA and bias in the same launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.codes import GroupCodes
from accessory.kernels.decoding import MOST_ROWS
from accessory.kernels.operands import check_device, check_floats, check_shape
from accessory.kernels.triton.decoding_products import _summed, _times

BLOCK, WARPS = 16, 4  # rows of a matrix that a program computes
UNITS = {1: 64, MOST_ROWS: 32}
"""Rows of x that a program is compiled for -> how many times eight columns it reads at once."""


def multiply(
    matrices: list[GroupCodes],
    x: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """x [rows, k] -> [rows, n] of each W in x's dtype, a launch each; everything is summed in fp32 and rounded once.

    low: x A^T of each matrix's LoRA, fp32 [rows, R a matrix, or more]. b: its second factors [N, R] in x's dtype,
    scaled. bias: fp32 [N]. Raises `AssertionError` for what does not fit together.
    """
    rows, k = x.shape
    widths = [w.shape[0] for w in matrices]
    _check(matrices, x, low, b, bias)
    y = torch.empty((rows, sum(widths)), dtype=x.dtype, device=x.device)
    compiled, before = 1 if rows == 1 else MOST_ROWS, 0
    rank = 0 if b is None else b.shape[1]
    for number, w in enumerate(matrices):
        n = w.shape[0]
        _multiply[(triton.cdiv(n, BLOCK),)](
            x,
            w.codes.view(torch.int32 if w.bits == 4 else torch.int16),
            x if w.high is None else w.high,
            w.scales,
            w.points if w.zeros is None else w.zeros,
            x if b is None else b,
            w.scales if bias is None else bias,
            w.scales if low is None else low,
            y,
            n,
            k,
            y.shape[1],
            before,
            number * rank,
            rows,
            0 if low is None else low.shape[1],
            k // 8,
            w.scales.shape[1],
            BITS=w.bits,
            GROUP=w.group,
            POINTS=w.zeros is None,
            BIAS=bias is not None,
            RANK=rank,
            ROWS=compiled,
            BLOCK=BLOCK,
            UNITS=UNITS[compiled],
            num_warps=WARPS,
        )
        before += n
    return y.split(widths, 1)


def takes(w: GroupCodes) -> bool:
    """Whether the matrix's columns are in their own order, in whole groups of eight."""
    plain = w.order is None and w.channel_scale is None and w.groups is None
    return plain and w.shape[1] % 8 == 0 and w.group % 8 == 0 and w.codes.storage_offset() % 4 == 0


def _check(matrices: list[GroupCodes], x: Tensor, low: Tensor | None, b: Tensor | None, bias: Tensor | None) -> None:
    check_floats(x=x)
    total = sum(w.shape[0] for w in matrices)
    if not (x.is_contiguous() and 0 < len(x) <= MOST_ROWS):
        raise AssertionError(f"x is {list(x.shape)}; expected 1 to {MOST_ROWS} contiguous rows")
    for w in matrices:
        w.check(x.device)
        if not takes(w) or w.shape[1] != x.shape[1]:
            raise AssertionError(f"a matrix of {w.shape} in groups of {w.group}, for {x.shape[1]} columns")
    if (low is None) != (b is None):
        raise AssertionError("LoRA needs its low products, and they need LoRA")
    if b is not None:
        check_shape(b, (total, b.shape[1]), "b")
        check_floats(x=x, b=b, low=low)
        if low.shape[0] != len(x) or low.shape[1] < len(matrices) * b.shape[1] or low.dtype != torch.float32:
            raise AssertionError(f"low is {low.dtype} {list(low.shape)} for {len(matrices)} of rank {b.shape[1]}")
    if bias is not None:
        check_shape(bias, (total,), "bias")
        check_device(x.device, bias=bias)


@triton.jit
def _multiply(
    x,
    codes,
    high,
    scales,
    zeros,
    b,
    bias,
    lows,
    y,
    n,
    k,
    made,
    before,
    first_low,
    rows,
    width,
    per_row,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    POINTS: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNITS: tl.constexpr,
):
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # of the result: a row of W
    row, unit, place = column.to(tl.int64)[:, None], tl.arange(0, UNITS), tl.arange(0, 8)
    total = tl.zeros([BLOCK, UNITS if ROWS == 1 else ROWS], tl.float32)
    for start in range(0, per_row, UNITS):
        at = start + unit
        inside = (row < n) & (at < per_row)[None, :]
        packed = tl.load(codes + row * per_row + at[None, :], inside, other=0).to(tl.int32)
        code = (packed[:, :, None] >> (place * WIDTH)[None, None, :]) & ((1 << WIDTH) - 1)
        if BITS == 3:
            third = tl.load(high + row * per_row + at[None, :], inside, other=0).to(tl.int32)
            code += ((third[:, :, None] >> place[None, None, :]) & 1) * 4
        statistic = row * groups + (at * 8 // GROUP)[None, :]
        scale = tl.load(scales + statistic, inside, other=0).to(tl.float32)
        zero = tl.load(zeros + statistic, inside, other=0).to(tl.float32)
        value = code.to(tl.float32)
        if ROWS == 1:
            given = tl.load(x + (at * 8)[:, None] + place[None, :], (at < per_row)[:, None], other=0).to(tl.float32)
            product, mass = tl.sum(value * given[None], 2), tl.sum(given, 1)[None, :]
            if POINTS:
                total += (product - zero * mass) * scale
            else:
                total += product * scale - zero * mass
        else:
            if POINTS:
                weight = (value - zero[:, :, None]) * scale[:, :, None]
            else:
                weight = value * scale[:, :, None] - zero[:, :, None]
            channel = start * 8 + tl.arange(0, UNITS * 8)
            there = (tl.arange(0, ROWS) < rows)[:, None] & (channel < k)[None, :]
            given = tl.load(x + tl.arange(0, ROWS)[:, None] * k + channel[None, :], there, other=0)
            weight = weight.reshape(BLOCK, UNITS * 8).to(given.dtype)
            total = tl.dot(weight, tl.trans(given), total, input_precision="ieee")
    result = tl.sum(total, 1)[:, None] if ROWS == 1 else total
    if RANK:
        low = _summed(lows, 1, width, first_low, rows, RANK, ROWS)
        place_of_b = (before + column).to(tl.int64)[:, None] * RANK + tl.arange(0, RANK)[None, :]
        result += _times(tl.load(b + place_of_b, (column < n)[:, None], other=0), low, ROWS)
    if BIAS:
        result += tl.load(bias + before + column, column < n, other=0)[:, None]
    one = tl.arange(0, ROWS)
    there = (column < n)[:, None] & (one < rows)[None, :]
    tl.store(y + one[None, :] * made + (before + column)[:, None], result.to(y.dtype.element_ty), there)
