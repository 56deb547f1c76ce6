"""How likely a model finds supervised tokens: log p of each, and whether it was the likeliest, without all logits.

As in the loss, one chunk's logits exist at a time, and tensor-parallel ranks communicate only statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accessory import kernels
from accessory.kernels.cross_entropy_steps import Reduce, over_all_ranks
from accessory.kernels.single_precision import product
from accessory.model.loss import chunk_rows, new_logits, reduce_over_ranks, rows_of_rank
from accessory.model.teaching import Lesson, Teaching


class TokenScores(NamedTuple):
    """Of n supervised tokens, in packed order. log_p: fp32 [n] (fp64 of fp64 states). likeliest: bool [n].
    divergences: t^2 KL(teacher || student), in the dtype of log_p [n]; None without a teacher.

    Of several tokens that are equally likely, the one with the lowest id counts as the likeliest, as in decoding.
    """

    log_p: Tensor
    likeliest: Tensor
    divergences: Tensor | None = None


@torch.no_grad()
def token_scores(
    hidden: Tensor, head: Tensor, labels: Tensor, vocab_size: int | None = None, teaching: Teaching | None = None
) -> TokenScores:
    """Score the labels that are not negative, equally on all model-parallel ranks, without a gradient.

    hidden [T, D]; head [V / ranks, D], this rank's rows; labels int64 [T], as in `cross_entropy_sum`, whose sum is that
    of -log_p. The whole head's rows from `vocab_size` on are padding and take no part; None: there are none.
    """
    rows, matrix = (labels >= 0).nonzero()[:, 0], head.to(hidden.dtype)
    log_p = torch.empty(len(rows), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
    likeliest = torch.empty(len(rows), dtype=torch.bool, device=hidden.device)
    most = chunk_rows(hidden.device)
    scores = new_logits(hidden, min(len(rows), most), len(head))  # allocated once, as in the loss
    before, width = rows_of_rank(len(head), vocab_size)
    reduce, lesson, divergences = reduce_over_ranks(), None, None
    if teaching is not None:
        lesson = Lesson(teaching, scores, rows_of_rank(len(head), teaching.vocab_size)[1], reduce)
        divergences = torch.empty_like(log_p)
    for at in range(0, len(rows), most):
        chunk = rows[at : at + most]
        logits = product(hidden[chunk], matrix.t(), out=scores[: len(chunk)])
        if lesson is not None:
            lesson.compare(chunk, logits)
            divergences[at : at + most] = lesson.divergences
        found = _score(logits, labels[chunk], before, width, reduce)
        log_p[at : at + most], likeliest[at : at + most] = found
    return TokenScores(log_p, likeliest, divergences)


def _score(
    scores: Tensor, labels: Tensor, before: int, width: int | None, reduce: Reduce | None
) -> tuple[Tensor, Tensor]:
    """(log p, whether it is the likeliest) of each label [c], from this rank's scores [c, V / ranks], which change."""
    if width is not None:
        scores[:, width:] = -torch.inf
    best, first = scores.max(1)  # before the statistics, which may overwrite the scores
    highest, mass, target = kernels.of("cross_entropy", scores).statistics(scores, labels - before, width)
    first += before
    if reduce:
        best = best.to(highest.dtype)
        highest, mass, target = over_all_ranks(highest, mass, target, reduce)
        first = -first.masked_fill_(best != highest, torch.iinfo(first.dtype).max)
        reduce(first, "max")  # the lowest id, since ids are negated
        first = -first
    return target - highest - mass.log(), first == labels
