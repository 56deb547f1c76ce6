"""What a teacher adds to the loss: the divergence of the student's next tokens from its own (Hinton et al. 2015)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accessory import kernels
from accessory.kernels.cross_entropy_steps import Reduce


class Teaching(NamedTuple):
    """What a teacher computed for the tokens of a batch, and how it counts.

    The loss of a token is (1 - weight) times its cross-entropy, and weight times t^2 KL(teacher || student), where both
    distributions are the softmax of logits / t, t being the temperature.

    hidden: [T, D'], the input of the teacher's head [V / ranks, D'], which is cut over ranks as the student's is; both
    in the student's dtype. vocab_size: rows of the whole heads that are compared; those behind are padding of either.
    entropy: fp64 [], to which the cross-entropies alone are added, each times its token's weight; None: nowhere.
    """

    hidden: Tensor
    head: Tensor
    vocab_size: int
    weight: float
    temperature: float
    entropy: Tensor | None = None


class Lesson:
    """Adds a teacher's part to a loss that is computed a chunk at a time.

    scores: the student's logits [c, V / ranks] of the largest chunk. width: those of them that are compared; None: all.
    """

    def __init__(self, teaching: Teaching, scores: Tensor, width: int | None, reduce: Reduce | None) -> None:
        self.teaching, self.width, self.reduce = teaching, width, reduce
        self.wanted = scores.new_empty_strided(scores.shape, scores.stride())  # rows lie as aligned as the student's
        self.kernel = kernels.of("divergence", scores)
        self.work = self.kernel.workspace(scores)
        self.divergences = scores.new_empty(0)

    def compare(self, rows: Tensor, scores: Tensor) -> None:
        """Look at the student's logits [c, V / ranks] of these rows of the batch, before they are changed."""
        given, wanted = self.teaching, self.wanted[: len(rows)]
        torch.mm(given.hidden[rows], given.head.t(), out=wanted)
        self.divergences = self.kernel.divergences_and_gradient(
            scores, wanted, given.temperature, self.width, self.reduce, self.work
        )

    def teach(self, gradient: Tensor, losses: Tensor, weights: Tensor | None) -> Tensor:
        """The same rows' losses [c] with the teacher's part; `gradient` [c, V / ranks] of theirs becomes that of these.

        losses: cross-entropies. weights: of the rows, or None.
        """
        share = self.teaching.weight
        if self.teaching.entropy is not None:
            wide = losses.double()
            self.teaching.entropy.add_(wide.sum() if weights is None else wide @ weights.double())
        gradient.lerp_(self.wanted[: len(losses)], share)
        return torch.lerp(losses, self.divergences, share)


def lesson_work_bytes(tokens: int, rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes that comparing two heads' logits takes beside them, for chunks of so many tokens and rows of a head."""
    scores = torch.empty(tokens, rows, dtype=dtype, device="meta")
    work = kernels.on("divergence", device, dtype).workspace(scores)
    return 0 if work is None else work.nbytes
