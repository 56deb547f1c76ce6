"""What LoRA (Hu et al. 2021) adds to a linear's product: y += scale * (dropout(x) A^T) B^T.

Under tensor parallelism it needs no communication of its own. Column: A is whole and B is cut with the rows of W, so
A's gradient is this rank's share. Row: A is cut with the columns of W and B is whole, the sum over ranks that the base
needs anyway completes the product, and B's gradient is this rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import Slicing, mark


class LoraFactor(nn.Module):
    """One low-rank factor, fp32: `lora_a` [R, in] or `lora_b` [out, R], or this rank's slice of it."""

    def __init__(self, shape: tuple[int, int], slicing: Slicing) -> None:
        super().__init__()
        self.weight = mark(nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")), slicing)


@dataclass(frozen=True)
class LowRank:
    """The factors of a linear, and how their product is scaled and dropped out of."""

    a: LoraFactor
    b: LoraFactor
    scale: float
    dropout: float = 0.0
    slices_input: bool = False
    """Whether each rank of the group multiplies with its own part of x (a row-parallel linear)."""

    def draw(self) -> Draw:
        """Scale and dropout of one forward.

        The seed comes from the CPU's generator, which the ranks of a model-parallel group start alike and use alike:
        an x that is whole on each of them must lose the same values. Of a cut x each has its own slice.
        """
        if not (self.dropout and self.a.training):
            return Draw(self.scale)
        seed = int(torch.randint(1 << 62, ()))
        if self.slices_input:
            seed += dist.get_rank(model_parallel_group())
        # What is kept grows by 1 / (1 - dropout): here, where no narrow dtype rounds it.
        return Draw(self.scale / (1 - self.dropout), self.dropout, seed)


@dataclass(frozen=True)
class Draw:
    """What LoRA's product of one forward is multiplied by, and which values of x it drops."""

    scale: float
    dropout: float = 0.0
    seed: int = 0

    def kept(self, x: Tensor) -> Tensor:
        """Ones and zeros of x's shape and dtype, a `dropout` of them zero: the same ones at every call."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        return torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
