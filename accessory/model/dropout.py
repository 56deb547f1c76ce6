"""Dropout on the embedding and on attention's weights while training (Srivastava et al. 2014)."""

from __future__ import annotations

import torch
from torch import Tensor


def drawn_seed() -> int:
    """From the CPU's generator, which is in the same state on all ranks of a model-parallel group."""
    return int(torch.randint(1 << 62, ()))


def dropped(x: Tensor, share: float) -> Tensor:
    """x, of which a `share` of the values, chosen anew at each call, is 0 and the others are divided by 1 - share.

    The same values on all ranks of a model-parallel group.
    """
    generator = torch.Generator(x.device).manual_seed(drawn_seed())
    kept = torch.empty_like(x).bernoulli_(1 - share, generator=generator)
    return x * kept * (1 / (1 - share))  # a factor 1 / (1 - share) in bf16 would be off by up to 0.4 %
