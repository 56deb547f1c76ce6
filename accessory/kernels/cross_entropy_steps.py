"""Cross-entropy in two steps, between which ranks with slices of the vocabulary combine their statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

Reduce = Callable[[Tensor, Literal["max", "sum"]], None]
"""Replaces each rank's tensor by the maximum, or the sum, over all ranks."""


def in_two_steps(
    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]],
    become_gradient: Callable[..., None],
    scores: Tensor,
    local: Tensor,
    width: int | None,
    reduce: Reduce | None,
) -> Tensor:
    """`losses_and_gradient` of kernels that have the other two: first each row's statistics, then the gradient."""
    highest, mass, target = statistics(scores, local, width)
    if reduce is not None:
        mine = highest.clone()
        reduce(highest, "max")
        mass *= (mine - highest).exp()
        reduce(mass, "sum")
        reduce(target, "sum")
    become_gradient(scores, local, highest, mass, width)
    return mass.log() + highest - target
