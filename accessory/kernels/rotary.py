"""Rotary embedding (Su et al. 2021): a token's heads turned in fp32, read and written once, in place if asked."""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.operands import check_device, check_floats, check_shape

CHANNELS = 4096  # of a token that one program turns


def rotate(
    x: Tensor,
    turn: Tensor,
    layout: Literal["pairs", "halves"] = "pairs",
    *,
    inverse: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Queries or keys x [T, heads, E] turned by `turn` complex64 [T, 1, R / 2], or back; the result has x's dtype.

    The first R channels of a head turn, neighbours together ("pairs") or channel i with i + R / 2 ("halves"); the rest
    pass through. `out` may be x itself; a head's channels must be adjacent in both, heads and tokens need not be.
    """
    tokens, heads, width = x.shape
    half = turn.shape[-1]
    turned = 2 * half
    if layout not in ("pairs", "halves"):
        raise AssertionError(f"layout {layout!r}; known: pairs, halves")
    if turn.dtype != torch.complex64 or turned > width:
        raise AssertionError(f"turn is {turn.dtype} of {turned} channels; expected torch.complex64 of up to {width}")
    check_shape(turn, (tokens, 1, half), "turn")
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    check_floats(x=x, out=out)
    check_device(x.device, turn=turn)
    check_shape(out, x.shape, "out")
    if out.dtype != x.dtype or out.stride(-1) != 1:
        raise AssertionError(f"out is {out.dtype}, strides {out.stride()}; expected {x.dtype}, adjacent channels")
    if not x.numel():
        return out
    pairs = triton.next_power_of_2(max(half, 1))
    rest = 0 if turned == width or out is x else triton.next_power_of_2(width - turned)
    block = min(triton.next_power_of_2(heads), max(CHANNELS // (2 * pairs), 1))
    _rotate[(tokens, triton.cdiv(heads, block))](
        x,
        torch.view_as_real(turn.resolve_conj().contiguous()),
        out,
        heads,
        width,
        half,
        *x.stride()[:2],
        *out.stride()[:2],
        NEIGHBOURS=layout == "pairs",
        INVERSE=inverse,
        HEADS=block,
        PAIRS=pairs,
        REST=rest,
        num_warps=4,
    )
    return out


@triton.jit
def _rotate(
    x,
    turn,
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
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    source = x + token * x_token + head * x_head
    target = out + token * out_token + head * out_head
    there = head < heads
    both, one = tl.arange(0, 2 * PAIRS), tl.arange(0, PAIRS)
    turned = 2 * half
    angles = tl.load(turn + token * turned + both, both < turned, other=0)
    cosine, sine = tl.split(angles.reshape(PAIRS, 2))
    cosine, sine = cosine[None, :], (-sine if INVERSE else sine)[None, :]
    if NEIGHBOURS:  # whole heads are read and written, 16 bytes a thread; a pair's two channels are in one thread
        inside = there & (both < turned)[None, :]
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
        column = turned + tl.arange(0, REST)[None, :]
        inside = there & (column < width)
        tl.store(target + column, tl.load(source + column, inside), inside)
