"""NF4 and FP4 dequantization (Dettmers et al. 2023): codes and their statistics, nested or not, in one pass.

Its time is that of its memory traffic, 2.5 bytes a weight in bf16. To get there, nested scales are decoded here and
never written, and the table of 16 values is looked up in shared memory, where each value has a bank of its own. (In
global memory, as bitsandbytes 0.50 does it, or as a tree of 15 selections, the lookups would take longer.)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.codes import BLOCK, NESTED_BLOCK, Codes
from accessory.kernels.operands import check_floats, check_shape

BLOCKS = 64  # blocks a program decodes: 4,096 weights, 32 of them to a thread


def dequantize(w: Codes, out: Tensor) -> Tensor:
    """Fill `out` [n, k], contiguous, with W in its dtype; returns it.

    All numbers are those of bitsandbytes to the last bit: each product and sum is rounded to fp32, the weight once more
    to out's dtype. Raises `AssertionError` for what does not fit together.
    """
    shape, codes, codebook, scales, nested, _ = w
    check_floats(out=out)
    check_shape(out, shape, "out")
    if out.numel() % 2:
        raise AssertionError(f"4-bit weights come in pairs; got {out.numel()}")
    w.check(out.device)
    if not out.is_contiguous():
        raise AssertionError(f"out has strides {out.stride()}; expected contiguous rows")
    nested_codebook, nested_scales, offset = nested or (codebook, scales, scales)
    if not out.numel():
        return out
    blocks = triton.cdiv(out.numel(), BLOCK)
    # Four bytes, eight weights, make a full 16-byte store in bf16; odd sizes and addresses go byte by byte.
    words = codes.numel() % 4 == 0 and codes.storage_offset() % 4 == 0
    units = codes.view(torch.int32) if words else codes
    _dequantize[(triton.cdiv(blocks, BLOCKS),)](
        units,
        scales,
        nested_scales,
        offset,
        nested_codebook,
        codebook,
        out,
        units.numel(),
        NESTED=nested is not None,
        PER_UNIT=8 if words else 2,
        BLOCK=BLOCK,
        NESTED_BLOCK=NESTED_BLOCK,
        BLOCKS=BLOCKS,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add would round a nested scale once instead of twice
    )
    return out


@triton.jit
def _dequantize(
    codes,
    scales,
    nested_scales,
    offset,
    nested_codebook,
    codebook,
    out,
    units,
    NESTED: tl.constexpr,
    PER_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    NESTED_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    UNITS: tl.constexpr = BLOCK // PER_UNIT
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.arange(0, BLOCKS)
    inside = (first + block) * UNITS < units
    scale = tl.load(scales + first + block, inside, other=0)
    if NESTED:
        group = tl.load(nested_scales + (first + block) // NESTED_BLOCK, inside, other=0)
        scale = tl.load(nested_codebook + scale.to(tl.int32)) * group + tl.load(offset)
    unit = block[:, None] * UNITS + tl.arange(0, UNITS)[None, :]
    present = first * UNITS + unit < units
    packed = tl.load(codes + first * UNITS + unit, present, other=0).to(tl.int32)
    place = tl.arange(0, PER_UNIT)
    # Low byte first, high nibble first: nibbles 1, 0, 3, 2, ... of a little-endian word.
    code = (packed[:, :, None] >> ((place ^ 1) * 4)[None, None, :]) & 15
    values = tl.load(codebook + tl.arange(0, 16))
    value = tl.gather(values, code.reshape(BLOCKS * BLOCK), 0).reshape(BLOCKS, UNITS, PER_UNIT)
    weight = value * scale[:, None, None]
    target = out + first * BLOCK + unit[:, :, None] * PER_UNIT + place[None, None, :]
    tl.store(target, weight.to(out.dtype.element_ty), present[:, :, None])
