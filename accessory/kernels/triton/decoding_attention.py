"""Attention of one new token a document to the cache, from the linears' result to the input of `wo`, in one launch.

The launch also rotates queries and the new key, and writes the new key and value to the cache. Programs share the
tokens of the cache; the last one to finish combines their results, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.decoding import MOST_ROWS, Attending
from accessory.kernels.operands import check_device, check_floats, check_shape, processors

TOKENS = 64  # the most tokens of the cache that a program reads at once
TILE = 1 << 14  # bytes of their keys, at most: tensor cores take keys and values from shared memory, two of each
LEAST = 256  # the fewest tokens of the cache for a program: with fewer, combining results takes longer


def takes(rows: int, width: int) -> bool:
    """Whether the kernel can compute heads of `width` channels for so many documents."""
    return 0 < rows <= MOST_ROWS and width in (16, 32, 64, 128, 256)


class Scratch:
    """Memory where programs leave their results for the last one: `rows` documents, a cache of `longest` tokens."""

    def __init__(self, how: Attending, rows: int, longest: int, device: torch.device) -> None:
        most = splits_of(longest, rows * how.kv_heads, device)
        places = rows * how.kv_heads * most * _padded(how)
        self.sums = torch.empty(places * how.width, dtype=torch.float32, device=device)
        self.statistics = torch.empty(places * 2, dtype=torch.float32, device=device)
        self.finished = torch.zeros(rows * how.kv_heads, dtype=torch.int32, device=device)


def attend(
    how: Attending, projected: Tensor, keys: Tensor, values: Tensor, positions: Tensor, span: int, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """q, k and v of new tokens [rows, (H + 2 K) E] at `positions` -> (result [rows, H E], low products of `wo`).

    keys, values: the caches [B, longest, K, E], B >= rows; k, rotated, and v are written at `positions` int64 [rows].
    span: how many tokens of the cache are looked at; positions are below it. low products: fp32 [rows, K, R'], in K
    parts. Raises `AssertionError` for what does not fit together.
    """
    rows = len(projected)
    _check(how, projected, keys, values, positions, span)
    splits = splits_of(span, rows * how.kv_heads, projected.device)
    out = torch.empty((rows, how.heads * how.width), dtype=projected.dtype, device=projected.device)
    ahead = 0 if how.following is None else len(how.following)
    partials = torch.empty((rows, how.kv_heads, ahead), dtype=torch.float32, device=out.device) if ahead else None
    _attend[(rows, how.kv_heads, splits)](
        projected,
        torch.view_as_real(how.rotations),
        keys,
        values,
        positions,
        out,
        scratch.sums,
        scratch.statistics,
        scratch.finished,
        out if how.following is None else how.following,
        *(how.norms or (scratch.statistics, scratch.statistics)),
        scratch.statistics if how.slopes is None else how.slopes,
        projected if how.beyond is None else how.beyond,
        scratch.sums if partials is None else partials,
        keys.stride(0),
        triton.cdiv(triton.cdiv(span, splits), TOKENS) * TOKENS,
        span if how.window is None else how.window,
        how.scale,
        how.eps,
        KV_HEADS=how.kv_heads,
        GROUP=how.heads // how.kv_heads,
        PADDED=_padded(how),
        WIDTH=how.width,
        HALF=how.rotations.shape[-1],
        NEIGHBOURS=how.layout == "pairs",
        SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        TOKENS=tokens_together(how.width, keys.dtype),
        AHEAD=ahead,
        NORM=how.norms is not None,
        SLOPES=how.slopes is not None,
        BEYOND=_beyond(how),
        num_warps=4,
    )
    return out, partials


def splits_of(span: int, programs: int, device: torch.device) -> int:
    """Programs that share a document's cache: enough for two on each multiprocessor, where there are tokens enough."""
    return max(min(triton.cdiv(2 * processors(device), programs), span // LEAST), 1)


def tokens_together(width: int, dtype: torch.dtype) -> int:
    """Tokens of the cache that a program reads at once: a power of two, and no fewer than tensor cores take."""
    return max(16, min(TOKENS, TILE // (width * dtype.itemsize)))


def _padded(how: Attending) -> int:
    """Rows of queries that a program computes; if there is more than one, tensor cores need sixteen."""
    group = how.heads // how.kv_heads
    return 1 if group == 1 else max(16, triton.next_power_of_2(group))


def _beyond(how: Attending) -> int:
    """Channels that keys and values have in the cache behind their own."""
    return 0 if how.beyond is None else how.beyond.shape[1]


def _check(how: Attending, projected: Tensor, keys: Tensor, values: Tensor, positions: Tensor, span: int) -> None:
    rows, channels = len(projected), (how.heads + 2 * how.kv_heads) * how.width
    check_floats(projected=projected, keys=keys, values=values)
    check_device(projected.device, positions=positions, rotations=how.rotations)
    check_shape(projected, (rows, channels), "projected")
    check_shape(keys, (len(keys), keys.shape[1], how.kv_heads, how.width + _beyond(how)), "keys")
    check_shape(values, tuple(keys.shape), "values")
    check_shape(positions, (rows,), "positions")
    if not takes(rows, how.width) or how.heads % how.kv_heads or 2 * how.rotations.shape[-1] > how.width:
        raise AssertionError(f"{rows} rows of {how.heads} heads for {how.kv_heads} of {how.width} channels")
    if len(keys) < rows or not 0 < span <= keys.shape[1] or len(how.rotations) < span:
        raise AssertionError(f"{span} of {keys.shape[1]} tokens of {rows} of {len(keys)} documents")
    whole = (projected, positions, *(one[0] for one in (keys, values)))
    if not all(tensor.is_contiguous() for tensor in whole) or keys.stride() != values.stride():
        raise AssertionError("parts whose rows lie apart")
    if positions.dtype != torch.int64 or not (keys.dtype == values.dtype == projected.dtype):
        raise AssertionError(f"keys of {keys.dtype} for {projected.dtype} at {positions.dtype}")
    if how.following is not None:
        check_shape(how.following, (len(how.following), how.heads * how.width), "following")
    _check_alibi(how, projected, span)
    for weight in how.norms or ():
        check_shape(weight, (how.width,), "norms")
        check_device(projected.device, norms=weight)
        if weight.dtype != torch.float32:
            raise AssertionError(f"norms are {weight.dtype}; expected torch.float32")


def _check_alibi(how: Attending, projected: Tensor, span: int) -> None:
    if how.slopes is not None:
        check_device(projected.device, slopes=how.slopes)
        check_shape(how.slopes, (how.heads,), "slopes")
        if how.slopes.dtype != torch.float32:
            raise AssertionError(f"slopes are {how.slopes.dtype}; expected torch.float32")
    if how.beyond is not None:
        check_floats(projected=projected, beyond=how.beyond)
        more = _beyond(how)
        if len(how.beyond) < span or more & (more - 1) or not how.beyond.is_contiguous():
            raise AssertionError(f"beyond is {list(how.beyond.shape)} for {span} tokens; expected a power of two")


@triton.jit
def _rotated(
    x, heads, channel, angles, norm, eps, WIDTH: tl.constexpr, HALF: tl.constexpr, NEIGHBOURS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The heads [N] of x, rotated by their token's angles [N, WIDTH]: each channel with its partner.

    NORM: each is divided by its root mean square first, and multiplied by `norm`.
    """
    if NEIGHBOURS:
        partner, angle, first = channel ^ 1, channel // 2, channel % 2 == 0
    else:
        first = channel < HALF
        partner, angle = tl.where(first, channel + HALF, channel - HALF), tl.where(first, channel, channel - HALF)
    rotated = channel < 2 * HALF
    partner = tl.where(rotated, partner, channel)
    cosine = tl.load(angles + 2 * angle, rotated, other=1)
    sine = tl.load(angles + 2 * angle + 1, rotated, other=0)
    place = x + heads[:, None] * WIDTH
    own = tl.load(place + channel[None, :]).to(tl.float32)
    other = tl.load(place + partner[None, :]).to(tl.float32)
    if NORM:
        inverse = tl.rsqrt(tl.sum(own * own, 1) / WIDTH + eps)[:, None]
        own = (own * inverse * tl.load(norm + channel)[None, :]).to(x.dtype.element_ty).to(tl.float32)
        other = (other * inverse * tl.load(norm + partner)[None, :]).to(x.dtype.element_ty).to(tl.float32)
    result = own * cosine[None, :] + other * tl.where(first, -sine, sine)[None, :]
    return result.to(x.dtype.element_ty)


@triton.jit
def _attend(
    projected,
    rotations,
    keys,
    values,
    positions,
    out,
    sums,
    statistics,
    finished,
    following,
    q_norm,
    k_norm,
    slopes,
    beyond,
    partials,
    document,
    share,
    window,
    scale,
    eps,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    AHEAD: tl.constexpr,
    NORM: tl.constexpr,
    SLOPES: tl.constexpr,
    BEYOND: tl.constexpr,
):
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    HEADS: tl.constexpr = GROUP * KV_HEADS
    CACHED: tl.constexpr = WIDTH + BEYOND  # channels of a key in the cache
    channel, query = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    position = tl.load(positions + row)
    own = projected + row.to(tl.int64) * ((HEADS + 2 * KV_HEADS) * WIDTH)
    angles = rotations + position * (2 * HALF)
    # Rows beyond the group's queries repeat its last one.
    heads = head * GROUP + tl.minimum(query, GROUP - 1)
    q = _rotated(own, heads, channel, angles, q_norm, eps, WIDTH, HALF, NEIGHBOURS, NORM)
    cached = row.to(tl.int64) * document + head * CACHED
    if SLOPES:
        slope = tl.load(slopes + heads)
    if split == 0:  # the new token's own key
        key_head = HEADS + head + tl.arange(0, 1)
        k = _rotated(own, key_head, channel, angles, k_norm, eps, WIDTH, HALF, NEIGHBOURS, NORM)
        v = tl.load(own + (HEADS + KV_HEADS + head) * WIDTH + channel)[None, :]
        place = cached + position * (KV_HEADS * CACHED) + channel[None, :]
        tl.store(keys + place, k)
        tl.store(values + place, v)
        if BEYOND:
            more = tl.arange(0, BEYOND)
            place = cached + position * (KV_HEADS * CACHED) + WIDTH + more
            tl.store(keys + place, tl.load(beyond + position * BEYOND + more))
            tl.store(values + place, tl.zeros([BEYOND], values.dtype.element_ty))
        highest = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale
        mass = tl.full([PADDED], 1.0, tl.float32)
        total = v.to(tl.float32) + tl.zeros([PADDED, WIDTH], tl.float32)
    else:
        highest = tl.full([PADDED], float("-inf"), tl.float32)
        mass = tl.zeros([PADDED], tl.float32)
        total = tl.zeros([PADDED, WIDTH], tl.float32)
    first = tl.maximum(split * share, position + 1 - window).to(tl.int32)
    end = tl.minimum((split + 1) * share, position).to(tl.int32)
    for start in range(first, end, TOKENS):
        token = start + tl.arange(0, TOKENS)
        seen = token < end
        place = cached + token.to(tl.int64)[:, None] * (KV_HEADS * CACHED) + channel[None, :]
        key = tl.load(keys + place, seen[:, None], other=0)
        if PADDED == 1:
            score = tl.sum(key.to(tl.float32) * q.to(tl.float32), 1)[None, :]
        else:
            score = tl.dot(q, tl.trans(key), input_precision="ieee")
        score *= scale
        if SLOPES:
            score -= slope[:, None] * (position - token).to(tl.float32)[None, :]
        score = tl.where(seen[None, :], score, float("-inf"))
        higher = tl.maximum(highest, tl.max(score, 1))
        kept, weight = tl.exp(highest - higher), tl.exp(score - higher[:, None])
        value = tl.load(values + place, seen[:, None], other=0)
        if PADDED == 1:
            new = tl.sum(tl.trans(weight) * value.to(tl.float32), 0)[None, :]
        else:
            new = tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * kept[:, None] + new
        mass, highest = mass * kept + tl.sum(weight, 1), higher
    if SPLITS == 1:
        _finish(total / mass[:, None], row, head, out, following, partials, KV_HEADS, GROUP, PADDED, WIDTH, AHEAD)
    else:
        pair = (row * KV_HEADS + head).to(tl.int64)
        at = (pair * SPLITS + split) * PADDED
        tl.store(sums + (at + query)[:, None] * WIDTH + channel[None, :], total)
        tl.store(statistics + (at + query) * 2, highest)
        tl.store(statistics + (at + query) * 2 + 1, mass)
        tl.debug_barrier()  # all threads have written before the program says that it has finished
        before = tl.atomic_add(finished + pair, 1, sem="acq_rel", scope="gpu")
        if before == SPLITS - 1:
            tl.debug_barrier()
            tl.store(finished + pair, 0)  # for the next launch
            each = tl.arange(0, SPLITS_PADDED)
            places = ((pair * SPLITS + each[:, None]) * PADDED + query[None, :]) * 2
            there = (each < SPLITS)[:, None]
            tops = tl.load(statistics + places, there, other=float("-inf"), cache_modifier=".cg")
            masses = tl.load(statistics + places + 1, there, other=0, cache_modifier=".cg")
            top = tl.max(tops, 0)
            mass = tl.sum(masses * tl.exp(tops - top[None, :]), 0)
            total = tl.zeros([PADDED, WIDTH], tl.float32)
            for i in range(SPLITS):
                theirs = (pair * SPLITS + i) * PADDED + query
                weight = tl.exp(tl.load(statistics + theirs * 2, cache_modifier=".cg") - top)
                part = tl.load(sums + theirs[:, None] * WIDTH + channel[None, :], cache_modifier=".cg")
                total += part * weight[:, None]
            total /= mass[:, None]
            _finish(total, row, head, out, following, partials, KV_HEADS, GROUP, PADDED, WIDTH, AHEAD)


@triton.jit
def _finish(
    result,
    row,
    head,
    out,
    following,
    partials,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED: tl.constexpr,
    WIDTH: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Write a group's results [PADDED, WIDTH], and their part of the low products."""
    channel, query = tl.arange(0, WIDTH), tl.arange(0, PADDED)
    rounded = result.to(out.dtype.element_ty)
    column = (head * GROUP + query)[:, None] * WIDTH + channel[None, :]
    tl.store(out + row.to(tl.int64) * (GROUP * KV_HEADS * WIDTH) + column, rounded, (query < GROUP)[:, None])
    if AHEAD:
        ahead = tl.arange(0, AHEAD)
        share = tl.zeros([AHEAD], tl.float32)
        for i in tl.static_range(GROUP):
            one = tl.sum(tl.where(query[:, None] == i, rounded.to(tl.float32), 0.0), 0)
            place = ahead[:, None] * (GROUP * KV_HEADS * WIDTH) + ((head * GROUP + i) * WIDTH + channel)[None, :]
            share += tl.sum(tl.load(following + place).to(tl.float32) * one[None, :], 1)
        tl.store(partials + (row * KV_HEADS + head) * AHEAD + ahead, share)
