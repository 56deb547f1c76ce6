"""Rotary embedding (Su et al. 2021): a token's heads rotated in fp32, read and written once."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.operands import check_device, check_floats, check_shape

CHANNELS = 4096  # of a token that one program rotates


def takes(dtype: torch.dtype) -> bool:
    """Whether rotations in `dtype` are read."""
    return dtype == torch.complex64


def rotate(x: Tensor, rotations: Tensor, layout: Literal["pairs", "halves"] = "pairs") -> Tensor:
    """As `accessory.kernels.plain.rotary.rotate`, by rotations in complex64. Heads and tokens of x may lie apart."""
    tokens, heads, width = x.shape
    half, back = rotations.shape[-1], rotations.is_conj()
    rotated = 2 * half
    if layout not in ("pairs", "halves"):
        raise AssertionError(f"layout {layout!r}; known: pairs, halves")
    if not takes(rotations.dtype) or rotated > width:
        raise AssertionError(
            f"rotations are {rotations.dtype} of {rotated} channels; expected torch.complex64 of up to {width}"
        )
    check_shape(rotations, (tokens, 1, half), "rotations")
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_floats(x=x)
    check_device(x.device, rotations=rotations)
    if not x.numel():
        return out
    pairs = triton.next_power_of_2(max(half, 1))
    rest = 0 if rotated == width else triton.next_power_of_2(width - rotated)
    block = min(triton.next_power_of_2(heads), max(CHANNELS // (2 * pairs), 1))
    _rotate[(tokens, triton.cdiv(heads, block))](
        x,
        torch.view_as_real((rotations.conj() if back else rotations).contiguous()),
        out,
        heads,
        width,
        half,
        *x.stride()[:2],
        *out.stride()[:2],
        NEIGHBOURS=layout == "pairs",
        INVERSE=back,
        HEADS=block,
        PAIRS=pairs,
        REST=rest,
        num_warps=4,
    )
    return out


@triton.jit
def _rotate(
    x,
    rotations,
    out,
    heads,
    width,
    half,
    x_token,
    x_head,
    out_token,
    out_head,
    NEIGHBOURS: tl.constexpr,
    INVERSE: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS))[:, None]
    source = x + token * x_token + head * x_head
    target = out + token * out_token + head * out_head
    there = head < heads
    both, one = tl.arange(0, 2 * PAIRS), tl.arange(0, PAIRS)
    rotated = 2 * half
    angles = tl.load(rotations + token * rotated + both, both < rotated, other=0)
    cosine, sine = tl.split(angles.reshape(PAIRS, 2))
    cosine, sine = cosine[None, :], (-sine if INVERSE else sine)[None, :]
    if NEIGHBOURS:  # whole heads are read and written, 16 bytes a thread; a pair's two channels are in one thread
        inside = there & (both < rotated)[None, :]
        value = tl.load(source + both[None, :], inside, other=0).to(tl.float32)
        a, b = tl.split(value.reshape(HEADS, PAIRS, 2))
        result = tl.join(a * cosine - b * sine, b * cosine + a * sine).reshape(HEADS, 2 * PAIRS)
        tl.store(target + both[None, :], result.to(out.dtype.element_ty), inside)
    else:
        inside = there & (one < half)[None, :]
        a = tl.load(source + one[None, :], inside, other=0).to(tl.float32)
        b = tl.load(source + half + one[None, :], inside, other=0).to(tl.float32)
        tl.store(target + one[None, :], (a * cosine - b * sine).to(out.dtype.element_ty), inside)
        tl.store(target + half + one[None, :], (b * cosine + a * sine).to(out.dtype.element_ty), inside)
    if REST:
        column = rotated + tl.arange(0, REST)[None, :]
        inside = there & (column < width)
        tl.store(target + column, tl.load(source + column, inside), inside)
