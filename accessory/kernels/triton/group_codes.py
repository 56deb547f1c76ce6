"""Matrices of 2, 3 and 4-bit codes in groups, unpacked in one pass: its time is that of its memory traffic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.codes import GroupCodes
from accessory.kernels.operands import check_floats, check_shape
from accessory.kernels.plain import group_codes as plain

COLUMNS = 8  # that a thread decodes, of whole bytes of every part, where rows have whole ones
UNITS = 1024  # such columns that a program decodes


def dequantize(w: GroupCodes, out: Tensor) -> Tensor:
    """Fill `out` [n, k], contiguous, with W in its dtype; returns it. The same bits as plain PyTorch's.

    Raises `AssertionError` for what does not fit together. Columns in another order than x's are left to plain PyTorch.
    """
    if any(part is not None for part in (w.order, w.channel_scale, w.groups)) or w.group % COLUMNS:
        return plain.dequantize(w, out)
    check_floats(out=out)
    check_shape(out, w.shape, "out")
    w.check(out.device)
    if not out.is_contiguous():
        raise AssertionError(f"out has strides {out.stride()}; expected contiguous rows")
    if not out.numel():
        return out
    n, k = w.shape
    word = torch.int32 if w.bits == 4 else torch.int16  # codes of eight columns
    words = k % COLUMNS == 0 and w.codes.storage_offset() % word.itemsize == 0
    per_unit = COLUMNS if words else 2 if w.bits == 4 else 4
    per_row = triton.cdiv(k, per_unit)
    units = min(UNITS, triton.next_power_of_2(per_row))
    rows = UNITS // units
    _dequantize[(triton.cdiv(n, rows), triton.cdiv(per_row, units))](
        w.codes.view(word) if words else w.codes,
        w.codes if w.high is None else w.high,
        w.scales,
        w.points if w.zeros is None else w.zeros,
        out,
        n,
        k,
        per_row,
        triton.cdiv(k, 8),
        w.scales.shape[1],
        BITS=w.bits,
        GROUP=w.group,
        POINTS=w.zeros is None,
        PER_UNIT=per_unit,
        ROWS=rows,
        UNITS=units,
        num_warps=4,
        enable_fp_fusion=False,  # of fp32 scales, a product and a difference are rounded each
    )
    return out


def workspace_bytes(shape: tuple[int, int], device: torch.device, *, ordered: bool) -> int:
    """Bytes that `dequantize` works in at most: those of plain PyTorch, which some matrices are left to."""
    return plain.workspace_bytes(shape, device, ordered=ordered)


@triton.jit
def _dequantize(
    codes,
    high,
    scales,
    zeros,
    out,
    n,
    k,
    per_row,
    high_bytes,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    POINTS: tl.constexpr,
    PER_UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    unit = (tl.program_id(1) * UNITS + tl.arange(0, UNITS))[None, :]
    inside = (row < n) & (unit < per_row)
    packed = tl.load(codes + row * per_row + unit, inside, other=0).to(tl.int32)
    at = row * groups + unit * PER_UNIT // GROUP
    scale = tl.load(scales + at, inside, other=0).to(tl.float32)
    zero = tl.load(zeros + at, inside, other=0).to(tl.float32)
    place = tl.arange(0, PER_UNIT)[None, None, :]
    code = (packed[:, :, None] >> (place * WIDTH)) & ((1 << WIDTH) - 1)
    if BITS == 3:
        third = tl.load(high + row * high_bytes + unit * PER_UNIT // 8, inside, other=0).to(tl.int32)
        code += ((third[:, :, None] >> (unit[:, :, None] * PER_UNIT % 8 + place)) & 1) * 4
    if POINTS:
        weight = (code.to(tl.float32) - zero[:, :, None]) * scale[:, :, None]
    else:
        weight = code.to(tl.float32) * scale[:, :, None] - zero[:, :, None]
    column = unit[:, :, None] * PER_UNIT + place
    present = inside[:, :, None] & (column < k)
    tl.store(out + row[:, :, None] * k + column, weight.to(out.dtype.element_ty), present)
