"""How a token's place enters attention: rotary embedding (Su et al. 2021), or ALiBi (Press et al. 2022)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory import kernels
from accessory.model.args import ModelArgs, RopeScaling
from accessory.model.decoding import decodes

Layout = Literal["pairs", "halves"]
LEAN_WIDTH = 8  # channels that ALiBi adds to a head; six are used, and CUDA's kernels want a multiple of eight


def rotary_frequencies(args: ModelArgs) -> Tensor:
    """Angle per position of each channel pair, fp32 [rotary_dim / 2]; empty for a model that is not rotary."""
    if args.position != "rotary":
        return torch.empty(0)
    exponents = torch.arange(0, args.rotary_dim, 2, dtype=torch.float32) / args.rotary_dim
    frequencies = 1.0 / (args.rope_theta**exponents)
    return _stretch(frequencies, args.rope_scaling) if args.rope_scaling else frequencies


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Linear scaling divides all frequencies; Llama 3's (Dubey et al. 2024) only the slow ones, with a smooth edge.

    Dynamic scaling starts beyond the trained context, which no document may leave.
    """
    if scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def rotations(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Unit complex numbers [T, 1, rotary_dim / 2] that turn each channel pair of a token at `positions` [T]."""
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, turn: Tensor, layout: Layout = "pairs") -> Tensor:
    """Rotate queries or keys x [T, heads, E] by `turn` [T, 1, rotary_dim / 2]; the result has x's dtype.

    Only the first rotary_dim channels of a head turn: neighbours together ("pairs"), or channel i with
    i + rotary_dim / 2 ("halves"). The rest pass through.
    """
    if decodes():
        return _turned(x, turn, layout)
    return _Rotate.apply(x, turn, layout)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the opposite rotation, so nothing but the shared angles is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, turn: Tensor, layout: Layout) -> Tensor:
        ctx.save_for_backward(turn)
        ctx.layout = layout
        return _turned(x, turn, layout)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        (turn,) = ctx.saved_tensors
        return _turned(dy, turn.conj(), ctx.layout), None, None


def _turned(x: Tensor, turn: Tensor, layout: Layout) -> Tensor:
    return kernels.of("rotary", x, turn.dtype).rotate(x, turn, layout)


def alibi_slopes(heads: int) -> Tensor:
    """How much each of `heads` heads' scores fall per token of distance, fp64 [H].

    For n heads, a power of two, 2^(-8/n) and its powers. Any other number takes those of the power of two below it,
    then every other one of those of the power of two above.
    """
    below = 1 << (heads.bit_length() - 1)
    exponents = torch.cat([torch.arange(1, below + 1) / below, torch.arange(1, 2 * below, 2) / (2 * below)])
    return torch.exp2(-8 * exponents[:heads].double())


def lean_channels(slopes: Tensor, positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ALiBi as channels of a head: for queries [H, LEAN_WIDTH], and for keys at `positions` [T], [T, 1, LEAN_WIDTH].

    A score that grows by slope x key position is, after the softmax, one that falls by slope x distance. That product
    is written into the scores' own product: no bias of heads x queries x keys is ever made or kept, and every attention
    kernel will do. Positions fall into two parts and slopes into three, so that narrow dtypes lose nothing up to
    position 65,535; the softmax's division by sqrt(head_dim) is taken back.
    """
    parts, rest = [], slopes * math.sqrt(head_dim)
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    query = torch.stack(parts, -1).repeat_interleave(2, -1)
    low = positions % 256
    key = torch.stack([positions - low, low], -1).to(dtype).repeat(1, 3)
    pad = (0, LEAN_WIDTH - query.shape[-1])
    return F.pad(query, pad), F.pad(key, pad)[:, None]


def lean(q: Tensor, k: Tensor, v: Tensor, channels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, E], k and v [T, K, E] with `channels` of `lean_channels` behind theirs, and zeros behind v's."""
    query, key = channels
    return (
        torch.cat([q, query.expand(len(q), -1, -1)], -1),
        torch.cat([k, key.expand(-1, k.shape[1], -1)], -1),
        F.pad(v, (0, LEAN_WIDTH)),
    )
