"""How positions enter attention: rotary embedding (Su et al. 2021), or ALiBi (Press et al. 2022)."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory import kernels
from accessory.model.args import ModelArgs, RopeScaling
from accessory.model.decoding import decodes

RotaryLayout = Literal["pairs", "halves"]
ALIBI_WIDTH = 8  # channels that ALiBi adds to a head; six are used, and CUDA's kernels want a multiple of eight


def rotary_frequencies(args: ModelArgs) -> Tensor:
    """Angle per position of each channel pair, fp32 [rotary_dim / 2]; empty for a model that is not rotary."""
    if args.position != "rotary":
        return torch.empty(0)
    exponents = torch.arange(0, args.rotary_dim, 2, dtype=torch.float32) / args.rotary_dim
    frequencies = 1.0 / (args.rope_theta**exponents)
    return _stretch(frequencies, args.rope_scaling) if args.rope_scaling else frequencies


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Linear scaling divides all frequencies; Llama 3's (Dubey et al. 2024) only low ones, with a smooth transition.

    Dynamic scaling begins beyond the trained context, and no document is longer than that.
    """
    if scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    cycles = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((cycles - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def rotations_at(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Unit complex numbers [T, 1, rotary_dim / 2] that rotate each channel pair of a token at `positions` [T]."""
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, rotations: Tensor, layout: RotaryLayout = "pairs") -> Tensor:
    """Rotate queries or keys x [T, heads, E] by `rotations` [T, 1, rotary_dim / 2]; the result has x's dtype.

    Only the first rotary_dim channels of a head are rotated: neighbours together ("pairs"), or channel i with
    i + rotary_dim / 2 ("halves"). The rest pass through.
    """
    if decodes():
        return _rotated(x, rotations, layout)
    return _Rotate.apply(x, rotations, layout)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the inverse rotation, so only the rotations, which all layers share, are saved."""

    @staticmethod
    def forward(ctx, x: Tensor, rotations: Tensor, layout: RotaryLayout) -> Tensor:
        """x [T, H, E] -> the same shape and dtype, each head rotated by its token's rotations."""
        ctx.save_for_backward(rotations)
        ctx.layout = layout
        return _rotated(x, rotations, layout)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None]:
        """dy [T, H, E] -> x's gradient, rotated back."""
        (rotations,) = ctx.saved_tensors
        return _rotated(dy, rotations.conj(), ctx.layout), None, None


def _rotated(x: Tensor, rotations: Tensor, layout: RotaryLayout) -> Tensor:
    return kernels.of("rotary", x, rotations.dtype).rotate(x, rotations, layout)


def alibi_slopes(heads: int) -> Tensor:
    """How much each head's scores decrease per token of distance, fp64 [heads].

    For n heads, n a power of two: 2^(-8/n) and its powers. For any other number: the slopes for the power of two below
    it, then every other slope for the power of two above it.
    """
    below = 1 << (heads.bit_length() - 1)
    exponents = torch.cat([torch.arange(1, below + 1) / below, torch.arange(1, 2 * below, 2) / (2 * below)])
    return torch.exp2(-8 * exponents[:heads].double())


@lru_cache  # cached: a copy to a device cannot be recorded in a CUDA graph
@torch.inference_mode(False)  # the cached tensor may be used in training, too
def alibi_slopes_on(device: torch.device, heads: int, begin: int, end: int) -> Tensor:
    """The slopes of heads `begin` to `end` of `heads`, on `device`."""
    return alibi_slopes(heads)[begin:end].to(device)


def alibi_channels(slopes: Tensor, positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ALiBi as channels of a head: [H, ALIBI_WIDTH] for queries, [T, 1, ALIBI_WIDTH] for keys at `positions` [T].

    Adding slope x key position to a score equals, after the softmax, subtracting slope x distance. These channels add
    that product to q k^T: no bias of heads x queries x keys is ever made or saved, and every attention kernel can be
    used. Positions are split into two parts and slopes into three, so that narrow dtypes lose nothing up to position
    65,535; slopes are multiplied by sqrt(head_dim), by which attention divides.
    """
    parts, rest = [], slopes * math.sqrt(head_dim)
    for _ in range(3):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].double()
    query = torch.stack(parts, -1).repeat_interleave(2, -1)
    low = positions % 256
    key = torch.stack([positions - low, low], -1).to(dtype).repeat(1, 3)
    pad = (0, ALIBI_WIDTH - query.shape[-1])
    return F.pad(query, pad), F.pad(key, pad)[:, None]


def append_alibi(q: Tensor, k: Tensor, v: Tensor, channels: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, E], k and v [T, K, E] with `alibi_channels` appended to q's and k's channels, and zeros to v's."""
    query, key = channels
    return (
        torch.cat([q, query.expand(len(q), -1, -1)], -1),
        torch.cat([k, key.expand(-1, k.shape[1], -1)], -1),
        F.pad(v, (0, ALIBI_WIDTH)),
    )
