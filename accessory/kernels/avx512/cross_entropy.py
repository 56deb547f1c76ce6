"""Cross-entropy over a chunk of bf16 logits, which become their own gradient, without an fp32 copy of them."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.cross_entropy_steps import in_two_steps
from accessory.kernels.operands import address, check_numbers, check_scores, made


def workspace(scores: Tensor) -> Tensor | None:
    """Nothing: scores are widened where they are read."""


def statistics(scores: Tensor, local: Tensor, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row of scores [c, V / ranks]: its highest, the sum of exp(score - highest), its label's; fp32 [c].

    As `accessory.kernels.triton.cross_entropy.statistics`, which explains the arguments.
    """
    check_numbers(scores, "scores")
    width = check_scores(scores, local, width)
    found = [made((len(scores),), torch.float32) for _ in range(3)]
    compiled("cross_entropy_statistics", "pppppnnnnn")(
        *map(address, (scores, local, *found)), *_extent(scores), width, torch.get_num_threads()
    )
    return tuple(found)


def become_gradient(scores: Tensor, local: Tensor, highest: Tensor, mass: Tensor, width: int | None = None) -> None:
    """Overwrite scores [c, V / ranks] with softmax minus one-hot, padding with 0; highest and mass are all ranks'."""
    check_numbers(scores, "scores")
    width = check_scores(scores, local, width, highest=highest, mass=mass)
    compiled("cross_entropy_gradient", "ppppnnnnn")(
        *map(address, (scores, local, highest, mass)), *_extent(scores), width, torch.get_num_threads()
    )


losses_and_gradient = in_two_steps(statistics, become_gradient)


def _extent(scores: Tensor) -> tuple[int, int, int]:
    return len(scores), scores.stride(0), scores.shape[1]
