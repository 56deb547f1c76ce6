"""Rotary position embedding (Su et al. 2021) in Meta's layout: neighbouring channels of a head rotate together."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accessory.model.args import ModelArgs, RopeScaling


def rotary_frequencies(args: ModelArgs) -> Tensor:
    """Angle per position of each channel pair, fp32 [E/2]."""
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    frequencies = 1.0 / (args.rope_theta**exponents)
    return _stretch(frequencies, args.rope_scaling) if args.rope_scaling else frequencies


def _stretch(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Linear scaling divides all frequencies; Llama 3's (Dubey et al. 2024) only the slow ones, with a smooth edge."""
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return frequencies * keep + frequencies / scaling.factor * (1 - keep)


def rotations(frequencies: Tensor, positions: Tensor) -> Tensor:
    """Unit complex numbers [T, 1, E/2] that turn each channel pair of a token at `positions` [T]."""
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, None]


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate queries or keys x [T, heads, E] by `turn` [T, 1, E/2]; the result has x's dtype."""
    return _Rotate.apply(x, turn)


class _Rotate(torch.autograd.Function):
    """A rotation's gradient is the opposite rotation, so nothing but the shared angles is kept."""

    @staticmethod
    def forward(ctx, x: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _turn(x, turn)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _turn(dy, turn.conj()), None


def _turn(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.to(turn.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)
