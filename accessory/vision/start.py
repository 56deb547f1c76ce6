"""How the parameters of a projection start, as torch's layers do."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Initializer = Callable[[torch.Generator], Tensor]
"""Makes a parameter's first values, fp32."""


def uniform(shape: tuple[int, ...], low: float, high: float) -> Initializer:
    """Evenly spread from `low` to `high`."""
    return lambda generator: torch.empty(shape).uniform_(low, high, generator=generator)


def constant(shape: tuple[int, ...], value: float) -> Initializer:
    """`value` everywhere."""
    return lambda _generator: torch.full(shape, value)


def linear_start(name: str, out_features: int, in_features: int) -> dict[str, Initializer]:
    """Of a linear called `name`: uniform within 1 / sqrt(in)."""
    bound = 1 / math.sqrt(in_features)
    return {
        f"{name}.weight": uniform((out_features, in_features), -bound, bound),
        f"{name}.bias": uniform((out_features,), -bound, bound),
    }


def norm_start(name: str, size: int) -> dict[str, Initializer]:
    """Of a LayerNorm called `name`: ones and zeros."""
    return {f"{name}.weight": constant((size,), 1.0), f"{name}.bias": constant((size,), 0.0)}
