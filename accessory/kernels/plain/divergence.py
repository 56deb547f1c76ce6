"""Divergence of a chunk of logits from a teacher's, which become the gradient of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accessory.kernels.cross_entropy_steps import Reduce

LOG2_E = math.log2(math.e)
_LEAST = -1e30
"""A score of padding: its power is 0, and so is the power times its difference from another's."""
_AT_ONCE = 1 << 20
"""Scores that are wide at a time, so that they stay in a CPU's cache from one operation to the next."""


def workspace(scores: Tensor) -> Tensor:
    """What `divergences_and_gradient` of such `scores` works in: wide copies of some rows, made once for all chunks."""
    rows = min(len(scores), max(1, _AT_ONCE // max(scores.shape[1], 1)))
    return scores.new_empty((3, rows, scores.shape[1]), dtype=torch.promote_types(scores.dtype, torch.float32))


def divergences_and_gradient(
    scores: Tensor,
    wanted: Tensor,
    temperature: float = 1.0,
    width: int | None = None,
    reduce: Reduce | None = None,
    work: Tensor | None = None,
) -> Tensor:
    """t^2 KL(p || q) of every row, p and q the softmax of wanted / t and of scores / t; fp32 [c] (fp64 of fp64).

    scores, wanted: [c, V / ranks], of one dtype. `wanted` becomes the gradient with respect to scores, t (q - p).
    width: scores from there on are padding, without probability or gradient. reduce: over the ranks, where there are
    several. work: of `workspace`, for as many rows at least.
    """
    work = workspace(scores) if work is None else work
    parts = zip(*(whole.split(work.shape[1]) for whole in (scores, wanted)), strict=True)
    found = [_of_rows(*part, temperature, width, reduce, work[:, : len(part[0])]) for part in parts]
    return torch.cat(found) if found else work.new_empty(0)


def _of_rows(
    scores: Tensor, wanted: Tensor, temperature: float, width: int | None, reduce: Reduce | None, work: Tensor
) -> Tensor:
    """`divergences_and_gradient` of as many rows as `work` [3, c, V / ranks] has."""
    both, difference = work[:2], work[2]
    both[0].copy_(scores)
    both[1].copy_(wanted)
    both.mul_(LOG2_E / temperature)  # powers of two take a third of the time of powers of e on a CPU
    if width is not None:
        both[:, :, width:] = _LEAST
    highest = both.amax(2)
    if reduce:
        reduce(highest, "max")
    both.sub_(highest[:, :, None])
    torch.sub(both[1], both[0], out=difference)
    both.exp2_()
    sums = torch.stack([*both.sum(2), difference.mul_(both[1]).sum(1)])
    if reduce:
        reduce(sums, "sum")
    own, taught, weighed = sums
    both.mul_((temperature / sums[:2])[:, :, None])
    wanted.copy_(both[0].sub_(both[1]))
    return temperature**2 * (weighed / taught / LOG2_E + own.log() - taught.log())
