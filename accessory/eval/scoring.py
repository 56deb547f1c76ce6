"""How likely continuations are after their contexts, every token computed once that several have at their beginning.

Choices of a question share their context, questions of a few-shot task their examples, and choices often their first
words. Sorted by tokens, what has a beginning in common lies side by side, and packing computes it once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from accessory.data.batch import IGNORE, WORTH_SHARING, PackedBatch
from accessory.errors import ConfigError
from accessory.eval.ranks import over_ranks
from accessory.kernels.single_precision import by_onednn
from accessory.meta import MetaModel

LAID_OUT = 8
"""Attention copies beginnings into each document: a batch has at most so many times its own tokens then."""


class Continuation(NamedTuple):
    """Ids to score, at least one, after the ids of a context, at least one."""

    context: Sequence[int]
    tokens: Sequence[int]


class Likelihood(NamedTuple):
    """The sum of log p of a continuation's tokens, and whether all of them were the likeliest."""

    log_p: float
    greedy: bool


class _Text(NamedTuple):
    """Context and continuation as one; `scored` ids at its end are the continuation. number: of its place in a list."""

    ids: np.ndarray
    scored: int
    number: int


def batch_tokens(device: torch.device) -> int:
    """Tokens of a micro-batch that a device is well used with."""
    return 2048 if device.type == "cpu" else 16384


def likelihoods(
    model: MetaModel,
    continuations: Sequence[Continuation],
    tokens_at_once: int | None = None,
    said: Callable[[int], None] | None = None,
    longest: int | None = None,
) -> list[Likelihood]:
    """The likelihood of each continuation, in their order. All ranks must call it alike, and share the work.

    Of a text, the last `longest` tokens are read; absent: as the model states. tokens_at_once: of a micro-batch. said:
    told how many continuations each of this rank's micro-batches had. Raises `ConfigError` for a continuation that is
    too long itself.
    """
    ahead = tokens_at_once or batch_tokens(model.llma.frequencies.device)
    numbers: dict[tuple[bytes, int], list[int]] = {}  # equal ones are computed once
    for number, given in enumerate(continuations):
        ids = _ids(given, longest or model.max_seq_len)
        numbers.setdefault((ids.astype(">u4").tobytes(), len(given.tokens)), []).append(number)
    texts = [_Text(np.frombuffer(ids, ">u4").astype(np.int64), scored, place)
             for place, (ids, scored) in enumerate(sorted(numbers))]  # fmt: skip
    places, batches = [numbers[key] for key in sorted(numbers)], list(_batches(texts, ahead))

    def score(batch: list[_Text]) -> list[Likelihood]:
        """The likelihoods of a batch's texts, after which the progress is told."""
        scored = _score(model, batch)
        if said:
            said(sum(len(places[text.number]) for text in batch))
        return scored

    found = [Likelihood(0.0, True)] * len(continuations)
    for batch, scored in zip(batches, over_ranks(batches, score), strict=True):
        for text, likelihood in zip(batch, scored, strict=True):
            for number in places[text.number]:
                found[number] = likelihood
    return found


def _ids(given: Continuation, longest: int) -> np.ndarray:
    """Ids of context and continuation, of which the model reads `longest` and predicts the last."""
    if not given.context or not 0 < len(given.tokens) <= longest:
        raise ConfigError(
            f"{len(given.tokens)} tokens are to be scored after {len(given.context)} others; expected at least one "
            f"after one, and at most {longest} (--max_seq_len)."
        )
    return np.array([*given.context, *given.tokens][-longest - 1 :], np.int64)


def _batches(texts: list[_Text], most: int) -> Iterator[list[_Text]]:
    """Sorted texts in groups of about `most` tokens, what they share counted once."""
    group: list[_Text] = []
    own = laid_out = 0
    for text in texts:
        new = len(text.ids) - 1 - (_shared(group[-1], text) if group else 0)
        if group and (own + new > most or laid_out + len(text.ids) > LAID_OUT * most):
            yield group
            group, own, laid_out, new = [], 0, 0, len(text.ids) - 1
        group.append(text)
        own, laid_out = own + new, laid_out + len(text.ids)
    if group:
        yield group


def _shared(one: _Text, other: _Text) -> int:
    """How many tokens both read first and predict the same after; `other` reads at least one more."""
    length = min(len(one.ids), len(other.ids))
    differ = one.ids[:length] != other.ids[:length]
    same = int(differ.argmax()) if differ.any() else length
    return max(min(same - 1, len(other.ids) - 2), 0)


def _score(model: MetaModel, texts: list[_Text]) -> list[Likelihood]:
    """Pack and score texts, whose beginnings may hold scored tokens that they share."""
    shared = (0, *map(_shared, texts, texts[1:]))
    if sum(shared) * WORTH_SHARING < sum(len(text.ids) - 1 for text in texts):
        shared = (0,) * len(texts)
    rows, packed = [], 0  # of each text: which packed token each of its tokens is
    for text, known in zip(texts, shared, strict=True):
        new = len(text.ids) - 1 - known
        rows.append(np.concatenate([rows[-1][:known] if rows else (), np.arange(packed, packed + new)]).astype(int))
        packed += new
    tokens, labels = np.empty(packed, np.int64), np.full(packed, IGNORE)
    for text, at in zip(texts, rows, strict=True):
        tokens[at], labels[at[-text.scored :]] = text.ids[:-1], text.ids[-text.scored :]
    lengths, numbers = tuple(map(len, rows)), tuple(text.number for text in texts)
    batch = PackedBatch(torch.from_numpy(tokens), torch.from_numpy(labels), lengths, numbers, shared)
    with by_onednn():
        scores = model.token_scores(batch.to(model.llma.frequencies.device))
    log_p, likeliest = np.zeros(packed), np.zeros(packed, bool)
    log_p[labels >= 0], likeliest[labels >= 0] = scores.log_p.double().cpu(), scores.likeliest.cpu()
    ends = [at[-text.scored :] for text, at in zip(texts, rows, strict=True)]
    return [Likelihood(float(log_p[at].sum()), bool(likeliest[at].all())) for at in ends]
