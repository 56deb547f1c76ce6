"""What is added to a linear's product with its weight: a bias and LoRA."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Addition(NamedTuple):
    """Added to x W^T, W [N, K]: bias [N], and LoRA's scale * (dropout(x) A^T) B^T (Hu et al. 2021), if they are there.

    a [R, K] and b [N, R], both or neither. dropout: the share of x's values that LoRA does not see in this forward, as
    `seed` chooses them; `scale` includes the factor 1 / (1 - dropout).
    """

    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    seed: int = 0

    def dropout_mask(self, x: Tensor) -> Tensor:
        """Of x's shape and dtype: 0 for a share `dropout` of the values, 1 for the others; the same at every call."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        return torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)


NOTHING = Addition()
