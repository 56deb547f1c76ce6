"""Cross-entropy over a chunk of logits, which become their own gradient: read twice and written once, no fp32 copy.

Each row's highest score, sum of exponentials ("mass") and label's score; then softmax minus one-hot in place. Most of a
chunk of bf16 logits stays in the L2 cache between the two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from accessory.kernels.cross_entropy_steps import in_two_steps
from accessory.kernels.operands import check_scores

BLOCK = 4096  # scores a program reads at a time


def workspace(scores: Tensor) -> Tensor | None:
    """Nothing: scores are widened where they are read."""


def statistics(scores: Tensor, local: Tensor, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row of scores [c, V / ranks]: its highest, the sum of exp(score - highest), its label's; fp32 [c].

    local int64 [c] are labels counted from this rank's first row of the vocabulary; one that is another rank's gives
    a score of 0, so that they add up. Scores from `width` on are padding and count as -inf: where all are, so is the
    highest, and the mass is 0.
    """
    width = check_scores(scores, local, width)
    highest, mass, target = torch.empty((3, len(scores)), dtype=torch.float32, device=scores.device)
    if len(scores):
        _statistics[(len(scores),)](
            scores, local, highest, mass, target, scores.stride(0), scores.shape[1], width, BLOCK=BLOCK, num_warps=8
        )
    return highest, mass, target


def become_gradient(scores: Tensor, local: Tensor, highest: Tensor, mass: Tensor, width: int | None = None) -> None:
    """Overwrite scores [c, V / ranks] with softmax minus one-hot, padding with 0; highest and mass are all ranks'."""
    width = check_scores(scores, local, width, highest=highest, mass=mass)
    if scores.numel():
        grid = (len(scores), triton.cdiv(scores.shape[1], BLOCK))
        _gradient[grid](
            scores, local, highest, mass, scores.stride(0), scores.shape[1], width, BLOCK=BLOCK, num_warps=8
        )


losses_and_gradient = in_two_steps(statistics, become_gradient)


@triton.jit
def _statistics(scores, local, highest, mass, target, stride, columns, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    best, total = -float("inf"), 0.0
    # An online softmax, rescaled a block at a time: with two exponentials a score it would not be bound by memory.
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        score = tl.load(scores + column, column < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(best, tl.max(score, 0))
        total = total * tl.exp(best - higher) + tl.sum(tl.exp(score - higher), 0)
        best = higher
    label = tl.load(local + row)
    found = tl.load(scores + label, (label >= 0) & (label < width), other=-float("inf")).to(tl.float32)
    tl.store(highest + row, best)
    tl.store(mass + row, total)
    tl.store(target + row, tl.where((label >= 0) & (label < columns), found, 0.0))


@triton.jit
def _gradient(scores, local, highest, mass, stride, columns, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = scores + row * stride + column
    score = tl.load(place, column < width, other=-float("inf")).to(tl.float32)
    share = tl.exp(score - tl.load(highest + row)) * (1 / tl.load(mass + row))
    result = share - tl.where(column == tl.load(local + row), 1.0, 0.0)
    tl.store(place, result.to(scores.dtype.element_ty), column < columns)
