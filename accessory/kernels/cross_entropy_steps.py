"""Cross-entropy in two steps, between which ranks with slices of the vocabulary combine their statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Reduce = Callable[[Tensor, Literal["max", "sum"]], None]
"""Replaces each rank's tensor by the maximum, or the sum, over all ranks."""


def in_two_steps(
    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]], become_gradient: Callable[..., None]
) -> Callable[..., Tensor]:
    """`losses_and_gradient` of a kernel that has the other two: first each row's statistics, then the gradient."""

    def losses_and_gradient(
        scores: Tensor,
        local: Tensor,
        width: int | None = None,
        reduce: Reduce | None = None,
        work: Tensor | None = None,
        likeliest: Tensor | None = None,
    ) -> Tensor:
        """As `accessory.kernels.plain.cross_entropy`, which explains the arguments; `work` is not needed."""
        highest, mass, target = statistics(scores, local, width)
        if reduce is not None:
            highest, mass, target = over_all_ranks(highest, mass, target, reduce)
        become_gradient(scores, local, highest, mass, width)
        if likeliest is not None:
            torch.eq(target, highest, out=likeliest)
        return mass.log() + highest - target

    return losses_and_gradient


def over_all_ranks(highest: Tensor, mass: Tensor, target: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel's `statistics` of this rank's slices of rows -> those of the whole rows."""
    whole = highest.clone()
    reduce(whole, "max")
    mass *= (highest - whole).exp()
    reduce(mass, "sum")
    reduce(target, "sum")
    return whole, mass, target
