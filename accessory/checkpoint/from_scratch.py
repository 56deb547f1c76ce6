"""What a new model's weights start as: the same numbers on every layout."""

from __future__ import annotations

import math

import torch

from accessory.checkpoint.load import targets
from accessory.method.base import Initializer
from accessory.model.decoder import Decoder

SPREAD = 0.02
"""Standard deviation of new matrices."""
_INTO_RESIDUAL = ("attention.wo.weight", "feed_forward.w2.weight")
"""Matrices whose products are added to what blocks hand on."""


def start_values(decoder: Decoder) -> dict[str, Initializer]:
    """Name of each parameter of `decoder`, on meta -> what makes its values: those of GPT-2.

    Matrices are normal with `SPREAD`, those whose products are added to what blocks hand on narrower by the root of
    twice the number of blocks (Radford et al. 2019, section 2.3). Norms start as 1, biases as 0.
    """
    narrow = SPREAD / math.sqrt(2 * decoder.args.n_layers)
    found: dict[str, Initializer] = {}
    for target in targets(decoder):
        shape = target.whole_shape(decoder.ranks)
        if len(shape) == 1:
            found[target.name] = _constant(shape, 0.0 if target.name.endswith(".bias") else 1.0)
        else:
            found[target.name] = _normal(shape, narrow if target.name.endswith(_INTO_RESIDUAL) else SPREAD)
    return found


def _constant(shape: tuple[int, ...], value: float) -> Initializer:
    return lambda generator: torch.full(shape, value)


def _normal(shape: tuple[int, ...], spread: float) -> Initializer:
    return lambda generator: torch.randn(shape, generator=generator) * spread
