"""Products of a few rows with plain or 4-bit matrices, with all that comes before and after them, in one launch.

While decoding, a launch takes longer than the work between two products. So one launch computes: the norm of its input,
up to three matrices, LoRA's second factors, biases, the gate or the residual, and the low products that the next
linears' LoRA needs. Each program writes its part of these; the next launch sums the parts in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.codes import NESTED_BLOCK
from accessory.kernels.decoding import MOST_ROWS, Products
from accessory.kernels.operands import check_floats, check_shape
from accessory.kernels.triton.gate import _activated

COLUMNS = {1: 512, MOST_ROWS: 256}
"""Rows of x that a program is compiled for -> the columns of a row of W that it reads at once."""
FEW, MANY = (16, 4), (32, 8)
"""(columns of the result, warps) of a program: few programs where parts of low products must be summed."""
ROOT, LAYER = tl.constexpr(1), tl.constexpr(2)
"""Norms: by the root mean square, and LayerNorm."""


def multiply(
    products: Products, x: Tensor, lows: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """x [rows, k] -> (result [rows, N] in x's dtype, low products of what follows fp32 [rows, P, R'], in P parts).

    lows: x A^T of each matrix's LoRA, fp32 [rows, P, R a matrix, or more], in parts to be summed; x before its norm,
    A times the norm's weight. residual: added to the result [rows, n]. Everything is summed in fp32 and rounded once.
    Raises `AssertionError` for what does not fit together.
    """
    rows, k = x.shape
    compiled = 1 if rows == 1 else MOST_ROWS
    _check(products, x, lows, residual)
    made, (block, warps) = products.made, FEW if products.following is None else MANY
    y = torch.empty((rows, made), dtype=x.dtype, device=x.device)
    count, following = triton.cdiv(made, block), products.following
    ahead = 0 if following is None else len(following)
    partials = torch.empty((rows, count, ahead), dtype=torch.float32, device=x.device) if ahead else None
    given, absent = _given(products), products.matrices[0] if products.plain else products.matrices[0].codebook
    programs = count if products.activation else sum(triton.cdiv(width, block) for width in products.widths)
    _multiply[(programs,)](
        x,
        absent if products.norm is None else products.norm,
        x if residual is None else residual,
        x if products.b is None else products.b,
        absent if products.bias is None else products.bias,
        absent if lows is None else lows,
        absent if products.corrections is None else products.corrections,
        x if following is None else following,
        y,
        absent if partials is None else partials,
        absent,
        given[0][2],
        *(part for parts in (given + 2 * given[:1])[:3] for part in (*parts[:2], *parts[3:])),
        *[*products.widths, 0, 0][:3],
        k,
        made,
        rows,
        *((0, 0) if lows is None else lows.shape[1:]),
        products.low_at,
        products.eps,
        MATRICES=len(products.matrices),
        NORM=0 if products.norm is None else (LAYER if products.layer_norm else ROOT).value,
        RESIDUAL=residual is not None,
        BIAS=products.bias is not None,
        RANK=0 if products.b is None else products.b.shape[1],
        AHEAD=ahead,
        ACTIVATION=products.activation or "",
        PLAIN=products.plain,
        NESTED=not products.plain and products.matrices[0].nested is not None,
        NESTED_BLOCK=NESTED_BLOCK,
        ROWS=compiled,
        BLOCK=block,
        COLUMNS=COLUMNS[compiled],
        num_warps=warps,
    )
    return y, partials


def _given(products: Products) -> list[tuple[Tensor, ...]]:
    """(codes, scales, codebook of nested scales, those, their offset) of each; a plain matrix stands for all five."""
    if products.plain:
        return [(matrix,) * 5 for matrix in products.matrices]
    return [
        (m.codes.view(torch.int32), m.scales, *(m.nested or (products.matrices[0].codebook, m.scales, m.scales)))
        for m in products.matrices
    ]


def _check(products: Products, x: Tensor, lows: Tensor | None, residual: Tensor | None) -> None:
    check_floats(x=x)
    products.check(x.dtype)
    if x.device != products.device:
        raise AssertionError(f"x is on {x.device}, the matrices on {products.device}")
    check_shape(x, (len(x), products.columns), "x")
    if not (x.is_contiguous() and 0 < len(x) <= MOST_ROWS):
        raise AssertionError(f"x is {list(x.shape)}; expected 1 to {MOST_ROWS} contiguous rows")
    for matrix in products.matrices:
        if not products.plain and matrix.codes.storage_offset() % 4:
            raise AssertionError("codes at an address that is no multiple of 4")
    if (lows is None) != (products.b is None):
        raise AssertionError("LoRA needs its low products, and they need LoRA")
    if lows is not None:
        check_shape(lows, (len(x), *lows.shape[1:]), "lows")
        wide = products.low_at + products.b.shape[1] * len(products.matrices)
        if lows.dim() != 3 or lows.shape[2] < wide:
            raise AssertionError(
                f"lows are {list(lows.shape)} for {len(products.matrices)} of rank {products.b.shape[1]}"
            )
        if lows.dtype != torch.float32 or not lows.is_contiguous():
            raise AssertionError(f"lows are {lows.dtype}; expected fp32, contiguous")
    if residual is not None:
        check_shape(residual, (len(x), products.made), "residual")
        check_floats(x=x, residual=residual)
        if not residual.is_contiguous():
            raise AssertionError("residual's rows lie apart")


def takes(rows: int) -> bool:
    """Whether the kernel computes so many rows together."""
    return 0 < rows <= MOST_ROWS


@triton.jit
def _product(
    x,
    norm,
    codes,
    scales,
    nested_scales,
    offset,
    nested_codebook,
    codebook,
    first,
    n,
    k,
    rows,
    eps,
    mean,
    deviation,
    PLAIN: tl.constexpr,
    NORM: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows `first` and on of W times every row of x [BLOCK, ROWS], and what to multiply them by [1, ROWS], fp32."""
    if PLAIN:
        result, squares = _of_plain(
            x, norm, codes, first, n, k, rows, mean, deviation, NORM, ROWS, BLOCK, COLUMNS
        )  # fmt: skip
    else:
        result, squares = _of_codes(
            x, norm, codes, scales, nested_scales, offset, nested_codebook, codebook, first, n, k, rows, mean,
            deviation, NORM, NESTED, NESTED_BLOCK, ROWS, BLOCK, COLUMNS,
        )  # fmt: skip
    inverse = tl.rsqrt(squares / k + eps) if NORM == ROOT else tl.full([1, ROWS], 1.0, tl.float32)
    return result, inverse


@triton.jit
def _statistics(x, k, rows, eps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(mean, 1 / deviation) of each row of x [ROWS]; by pieces (Chan et al. 1979), as sums of squares would cancel."""
    row = tl.arange(0, ROWS)
    mean, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, k, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < rows)[:, None] & (column < k)[None, :]
        value = tl.load(x + row[:, None] * k + column[None, :], inside, other=0).to(tl.float32)
        count = tl.minimum(k - start, COLUMNS).to(tl.float32)
        own = tl.sum(value, 1) / count
        apart = tl.where(inside, value - own[:, None], 0.0)
        share = count / (start + count)
        squares += tl.sum(apart * apart, 1) + (own - mean) * (own - mean) * (start * share)
        mean += (own - mean) * share
    return mean, tl.rsqrt(squares / k + eps)


@triton.jit
def _of_plain(
    x, norm, weights, first, n, k, rows, mean, deviation, NORM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The product [BLOCK, ROWS], and the sum of squares of each row of x [1, ROWS], with a plain W."""
    row = (first + tl.arange(0, BLOCK)).to(tl.int64)
    if ROWS == 1:
        total = tl.zeros([BLOCK, COLUMNS], tl.float32)
        squares = tl.zeros([COLUMNS], tl.float32)
    else:
        total = tl.zeros([BLOCK, ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, k, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < n)[:, None] & (column < k)[None, :]
        weight = tl.load(weights + row[:, None] * k + column[None, :], inside, other=0)
        if ROWS == 1:
            given = tl.load(x + column, column < k, other=0).to(tl.float32)
            if NORM == ROOT:
                squares += given * given
            given = _normed(given, norm, column, column < k, k, tl.sum(mean, 0), tl.sum(deviation, 0), NORM)
            total += weight.to(tl.float32) * given[None, :]
        else:
            given, top, more = _several(x, norm, column, k, rows, mean, deviation, NORM, ROWS)
            squares += more
            total = _plus_dot(total, weight, given, top, NORM)
    if ROWS == 1:
        result = tl.sum(total, 1)[:, None]
        sum_of_squares = tl.sum(squares, 0) + tl.zeros([1, 1], tl.float32)
    else:
        result = total
        sum_of_squares = squares[None, :]
    return result, sum_of_squares


@triton.jit
def _normed(wide, norm, column, there, k, mean, deviation, NORM: tl.constexpr):
    """x, in fp32, times the norm's weight; of LayerNorm all it does. column, there: as `wide`'s last dimensions."""
    if NORM == LAYER:
        weight, shift = tl.load(norm + column, there, other=0), tl.load(norm + k + column, there, other=0)
        wide = (wide - mean) * deviation * weight + shift
    elif NORM == ROOT:
        wide *= tl.load(norm + column, there, other=0)
    return wide


@triton.jit
def _several(x, norm, column, k, rows, mean, deviation, NORM: tl.constexpr, ROWS: tl.constexpr):
    """(columns of all rows of x, as `_normed`, in x's dtype; their divisor [ROWS]; sums of their squares [ROWS]).

    In fp16 the product with the norm's weight may be too large before it is divided by the root mean square.
    """
    there = (tl.arange(0, ROWS) < rows)[:, None] & (column < k)[None, :]
    given = tl.load(x + tl.arange(0, ROWS)[:, None] * k + column[None, :], there, other=0)
    squares, top = tl.zeros([ROWS], tl.float32), tl.full([ROWS], 1.0, tl.float32)
    if NORM:
        wide = given.to(tl.float32)
        squares = tl.sum(wide * wide, 1)
        at = column[None, :]
        wide = _normed(wide, norm, at, at < k, k, mean[:, None], deviation[:, None], NORM)
        if given.dtype == tl.float16:
            top = _divisor(wide)
            wide /= top[:, None]
        given = wide.to(given.dtype)
    return given, top, squares


@triton.jit
def _divisor(wide):
    """What brings each row [ROWS, N] to numbers of at most 1; 1 for a row of zeros."""
    highest = tl.max(tl.abs(wide), 1)
    return tl.where(highest > 0, highest, 1.0)


@triton.jit
def _plus_dot(total, weight, given, top, NORM: tl.constexpr):
    """total + weight [BLOCK, N] times given [ROWS, N], each row times its divisor."""
    if NORM and given.dtype == tl.float16:
        total += tl.dot(weight, tl.trans(given), input_precision="ieee") * top[None, :]
    else:
        total = tl.dot(weight, tl.trans(given), total, input_precision="ieee")
    return total


@triton.jit
def _of_codes(
    x,
    norm,
    codes,
    scales,
    nested_scales,
    offset,
    nested_codebook,
    codebook,
    first,
    n,
    k,
    rows,
    mean,
    deviation,
    NORM: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The same with a W in codes."""
    GROUPS: tl.constexpr = COLUMNS // 64
    row = (first + tl.arange(0, BLOCK)).to(tl.int64)
    group, word, place = tl.arange(0, GROUPS), tl.arange(0, 8), tl.arange(0, 8)
    table = tl.load(codebook + tl.arange(0, 16))
    per_row = k // 64
    if NESTED:
        middle = tl.load(offset)
    if ROWS == 1:
        total = tl.zeros([BLOCK, GROUPS, 8], tl.float32)
        squares = tl.zeros([GROUPS, 8, 8], tl.float32)
    else:
        total = tl.zeros([BLOCK, ROWS], tl.float32)
        squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, per_row, GROUPS):
        at = start + group
        inside = (row < n)[:, None] & (at < per_row)[None, :]
        block = row[:, None] * per_row + at[None, :]
        packed = tl.load(codes + block[:, :, None] * 8 + word[None, None, :], inside[:, :, None], other=0)
        scale = tl.load(scales + block, inside, other=0)
        if NESTED:
            share = tl.load(nested_scales + block // NESTED_BLOCK, inside, other=0)
            scale = tl.load(nested_codebook + scale.to(tl.int32)) * share + middle
        # Low byte first, high nibble first: nibbles 1, 0, 3, 2, ... of a little-endian word.
        code = (packed[:, :, :, None] >> ((place ^ 1) * 4)[None, None, None, :]) & 15
        value = tl.gather(table, code.reshape(BLOCK * COLUMNS), 0).reshape(BLOCK, GROUPS, 8, 8)
        if ROWS == 1:
            column = (at * 64)[:, None, None] + (word * 8)[None, :, None] + place[None, None, :]
            there = (at < per_row)[:, None, None]
            given = tl.load(x + column, there, other=0).to(tl.float32)
            if NORM == ROOT:
                squares += given * given
            given = _normed(given, norm, column, there, k, tl.sum(mean, 0), tl.sum(deviation, 0), NORM)
            total += tl.sum(value * given[None], 3) * scale[:, :, None]
        else:
            given, top, more = _several(
                x, norm, start * 64 + tl.arange(0, COLUMNS), k, rows, mean, deviation, NORM, ROWS
            )  # fmt: skip
            squares += more
            weight = (value * scale[:, :, None, None]).reshape(BLOCK, COLUMNS).to(given.dtype)
            total = _plus_dot(total, weight, given, top, NORM)
    if ROWS == 1:
        result = tl.sum(tl.sum(total, 2), 1)[:, None]
        sum_of_squares = tl.sum(tl.sum(tl.sum(squares, 2), 1), 0) + tl.zeros([1, 1], tl.float32)
    else:
        result = total
        sum_of_squares = squares[None, :]
    return result, sum_of_squares


@triton.jit
def _times(one, other, ROWS: tl.constexpr):
    """one [N, R] times other [ROWS, R] -> [N, ROWS], fp32; a single row without tensor cores."""
    if ROWS == 1:
        result = tl.sum(one.to(tl.float32) * other, 1)[:, None]
    elif one.dtype == tl.float16:  # x A^T of an x that is not divided by its root mean square yet may be too large
        top = _divisor(other)
        result = tl.dot(one, tl.trans((other / top[:, None]).to(one.dtype)), input_precision="ieee") * top[None, :]
    else:
        result = tl.dot(one, tl.trans(other.to(one.dtype)), input_precision="ieee")
    return result


@triton.jit
def _low(
    lows, corrections, parts, width, low_at, which, rows, mean, deviation, MATRICES: tl.constexpr, NORM: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The low products [ROWS, RANK] of matrix number `which`; with LayerNorm, of its result."""
    low = _summed(lows, parts, width, low_at + which * RANK, rows, RANK, ROWS)
    if NORM == LAYER:
        at = which * RANK + tl.arange(0, RANK)
        low -= mean[:, None] * tl.load(corrections + at)[None, :]
        low = low * deviation[:, None] + tl.load(corrections + MATRICES * RANK + at)[None, :]
    return low


@triton.jit
def _summed(lows, parts, width, first, rows, RANK: tl.constexpr, ROWS: tl.constexpr):
    """The sum of the parts, columns `first` and on [ROWS, RANK]."""
    PARTS: tl.constexpr = 64 if ROWS == 1 else 8
    rank = first + tl.arange(0, RANK)
    if ROWS == 1:
        total = tl.zeros([PARTS, RANK], tl.float32)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            total += tl.load(lows + part[:, None] * width + rank[None, :], (part < parts)[:, None], other=0)
        low = tl.sum(total, 0)[None, :]
    else:
        low = tl.zeros([ROWS, RANK], tl.float32)
        row = tl.arange(0, ROWS)
        for start in range(0, parts, PARTS):
            part = start + tl.arange(0, PARTS)
            inside = (row < rows)[:, None] & (part < parts)[None, :]
            at = (row[:, None] * parts + part[None, :]) * width
            low += tl.sum(tl.load(lows + at[:, :, None] + rank[None, None, :], inside[:, :, None], other=0), 1)
    return low


@triton.jit
def _multiply(
    x,
    norm,
    residual,
    b,
    bias,
    lows,
    corrections,
    following,
    y,
    partials,
    codebook,
    nested_codebook,
    codes,
    scales,
    nested_scales,
    offset,
    codes_1,
    scales_1,
    nested_scales_1,
    offset_1,
    codes_2,
    scales_2,
    nested_scales_2,
    offset_2,
    n,
    n_1,
    n_2,
    k,
    made,
    rows,
    parts,
    width,
    low_at,
    eps,
    MATRICES: tl.constexpr,
    NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    AHEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PLAIN: tl.constexpr,
    NESTED: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    which = 0
    before = 0  # columns of the matrices before this program's
    if ACTIVATION == "" and MATRICES > 1:
        blocks, blocks_1 = tl.cdiv(n, BLOCK), tl.cdiv(n_1, BLOCK)
        if program >= blocks + blocks_1:
            which, before = 2, n + n_1
            program -= blocks + blocks_1
        elif program >= blocks:
            which, before = 1, n
            program -= blocks
        codes = tl.where(which == 0, codes, tl.where(which == 1, codes_1, codes_2))
        scales = tl.where(which == 0, scales, tl.where(which == 1, scales_1, scales_2))
        nested_scales = tl.where(which == 0, nested_scales, tl.where(which == 1, nested_scales_1, nested_scales_2))
        offset = tl.where(which == 0, offset, tl.where(which == 1, offset_1, offset_2))
        n = tl.where(which == 0, n, tl.where(which == 1, n_1, n_2))
    first = program * BLOCK
    mean, deviation = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if NORM == LAYER:
        mean, deviation = _statistics(x, k, rows, eps, ROWS, COLUMNS)
    result, inverse = _product(
        x, norm, codes, scales, nested_scales, offset, nested_codebook, codebook, first, n, k, rows, eps, mean,
        deviation, PLAIN, NORM, NESTED, NESTED_BLOCK, ROWS, BLOCK, COLUMNS,
    )  # fmt: skip
    column = first + tl.arange(0, BLOCK)
    inside = column < n
    rank = tl.arange(0, RANK if RANK else 1)
    if RANK:
        low = _low(
            lows, corrections, parts, width, low_at, which, rows, mean, deviation, MATRICES, NORM, RANK, ROWS
        )  # fmt: skip
        factor = tl.load(b + (before + column).to(tl.int64)[:, None] * RANK + rank[None, :], inside[:, None], other=0)
        result += _times(factor, low, ROWS)
    result *= inverse
    if BIAS:
        result += tl.load(bias + before + column, inside, other=0)[:, None]
    if ACTIVATION != "":
        result, _slope = _activated(result, ACTIVATION)
    if ACTIVATION != "" and MATRICES == 2:
        other, _same = _product(
            x, norm, codes_1, scales_1, nested_scales_1, offset_1, nested_codebook, codebook, first, n, k, rows, eps,
            mean, deviation, PLAIN, NORM, NESTED, NESTED_BLOCK, ROWS, BLOCK, COLUMNS,
        )  # fmt: skip
        if RANK:
            low = _low(
                lows, corrections, parts, width, low_at, 1, rows, mean, deviation, MATRICES, NORM, RANK, ROWS
            )  # fmt: skip
            factor = tl.load(b + (n + column).to(tl.int64)[:, None] * RANK + rank[None, :], inside[:, None], other=0)
            other += _times(factor, low, ROWS)
        other *= inverse
        if BIAS:
            other += tl.load(bias + n + column, inside, other=0)[:, None]
        result *= other
    row = tl.arange(0, ROWS)
    at = row[None, :] * made + (before + column)[:, None]
    there = inside[:, None] & (row < rows)[None, :]
    if RESIDUAL:
        result += tl.load(residual + at, there, other=0).to(tl.float32)
    rounded = result.to(y.dtype.element_ty)
    tl.store(y + at, rounded, there)
    if AHEAD:
        ahead = tl.arange(0, AHEAD)
        factor = tl.load(following + ahead[:, None] * made + column[None, :], inside[None, :], other=0)
        # The columns beyond the last are 0 in both.
        shares = _times(factor, tl.trans(tl.where(there, rounded.to(tl.float32), 0.0)), ROWS)
        place = (row[None, :] * tl.num_programs(0) + tl.program_id(0)) * AHEAD + ahead[:, None]
        tl.store(partials + place, shares, (row < rows)[None, :] & (ahead < AHEAD)[:, None])
