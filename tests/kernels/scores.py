"""Scores to learn from, and what a kernel of cross-entropy has to make of them."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def problem(rows: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Random scores [c, V], far apart, and labels [c], the first, the middle and the last of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[0], labels[1], labels[-1] = 0, vocabulary // 2, vocabulary - 1
    return scores, labels


def exact(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every row's loss, and their gradient, in float64."""
    leaf = scores.double().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none")
    losses.sum().backward()
    return losses.detach(), leaf.grad


def over_slices(kernel: ModuleType, slices: list[Tensor], labels: Tensor, vocabulary: int) -> Tensor:
    """Losses from slices of the vocabulary, as ranks would agree on them; the slices become their gradients."""
    step = slices[0].shape[1]
    shares = [(part, labels - i * step, min(max(vocabulary - i * step, 0), step)) for i, part in enumerate(slices)]
    highest, mass, target = (torch.stack(found) for found in zip(*(kernel.statistics(*s) for s in shares), strict=True))
    top = highest.amax(0)
    total = (mass * (highest - top).exp()).sum(0)
    for part, local, width in shares:
        kernel.become_gradient(part, local, top, total, width)
    return total.log() + top - target.sum(0)


def check_padding_alone(kernel: ModuleType, dtype: torch.dtype) -> None:
    """A rank that has nothing else has no highest score and no mass, and its gradient is zero."""
    scores, labels = problem(4, 10, dtype)
    highest, mass, target = kernel.statistics(scores, labels - 20, 0)
    assert (highest == -torch.inf).all() and not mass.any() and not target.any()
    kernel.become_gradient(scores, labels - 20, torch.zeros(4), torch.ones(4), 0)
    assert not scores.any()
