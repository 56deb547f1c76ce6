"""The choice of the next token: the likeliest, or one drawn from what a few cuts leave of the distribution.

They follow one another as in transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_COLDEST = 1e-3  # below it softmax overflows, and the likeliest token is all there is
NOTHING = -2
"""What is drawn where logits are no finite numbers: the host learns of it when it reads the token."""


class Choice(NamedTuple):
    """How a token is chosen.

    temperature: what logits are divided by; below 0.001 the likeliest token is taken. top_k: draw from so many of the
    likeliest tokens; 0: from all. top_p: draw from the smallest set of likeliest tokens that together have this
    probability (Holtzman et al. 2020). min_p: draw from those at least so probable, as a share of the likeliest one's
    probability (Nguyen et al. 2024). repetition_penalty: divides the logits of tokens that are in the prompt or the
    answer already if they are positive, and multiplies them if they are negative (Keskar et al. 2019); 1: none.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Seen:
    """Which tokens each of B documents holds."""

    def __init__(self, documents: Sequence[Sequence[int]], vocab_size: int, device: torch.device) -> None:
        """Ids beyond the vocabulary, such as placeholders, are left out."""
        self.marks = torch.zeros(len(documents), vocab_size, dtype=torch.bool, device=device)
        for marks, ids in zip(self.marks, documents, strict=True):
            held = [token for token in set(ids) if 0 <= token < vocab_size]
            marks[torch.tensor(held, dtype=torch.int64, device=device)] = True

    def add(self, tokens: Tensor) -> None:
        """One token more of each document [B]."""
        self.marks.scatter_(1, tokens[:, None], True)

    def keep(self, rows: list[int]) -> None:
        """Keep only those documents."""
        self.marks = self.marks[rows]

    def penalize(self, logits: Tensor, penalty: float) -> Tensor:
        """logits [B, V] -> those of tokens that are there made smaller."""
        return torch.where(self.marks, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose(
    logits: Tensor, choice: Choice, generators: Sequence[torch.Generator | None], seen: Seen | None = None
) -> Tensor:
    """logits [B, V] -> token ids [B]; `NOTHING` for a document whose probabilities are no numbers.

    generators: one for all documents, or one for each. seen: needed for a repetition penalty.
    """
    if seen is not None:
        logits = seen.penalize(logits, choice.repetition_penalty)
    if choice.temperature < _COLDEST:
        return logits.argmax(-1)
    probabilities, order = candidates(logits, choice)
    parts = probabilities.split(1) if len(generators) > 1 else [probabilities]
    places = torch.cat([_drawn(part, one) for part, one in zip(parts, generators, strict=True)])
    return order.gather(-1, places)[:, 0].masked_fill_(probabilities.sum(-1).isnan(), NOTHING)


def _drawn(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """probabilities [B, n] -> places [B, 1], each drawn as often as it is probable.

    The winner of an exponential race: the same as of `torch.multinomial`, which does this too, but has the host wait
    for a GPU twice, to check the probabilities.
    """
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return probabilities.div(times).argmax(-1, keepdim=True)


def candidates(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """logits [B, V] -> (probabilities [B, n], zero for tokens that are cut, and their ids [B, n]), the likeliest first.

    The probabilities of those that are left need not sum to 1.
    """
    scaled = logits / choice.temperature
    if choice.top_k:
        scaled, order = scaled.topk(min(choice.top_k, scaled.shape[-1]))
        probabilities = scaled.softmax(-1)
    else:
        probabilities, order = scaled.softmax(-1).sort(-1, descending=True)
    # The token that crosses top_p stays: the nucleus is the smallest set that reaches it.
    beyond = probabilities.cumsum(-1) - probabilities >= choice.top_p
    beyond |= probabilities < choice.min_p * probabilities[:, :1]
    beyond[:, 0] = False  # even a top_p of 0 leaves the likeliest token
    return probabilities.masked_fill_(beyond, 0), order
