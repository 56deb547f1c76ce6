"""What a model answers to the questions of a data file, beside the answers that the file expects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from accessory.data.corpus import Corpus, build_corpus
from accessory.errors import ConfigError
from accessory.meta import MetaModel, Sampling

BATCH = 8
"""Questions answered together."""


def predictions(
    model: MetaModel, data: Path, *, limit: int | None = None, dialog: bool = False, how: Sampling | None = None
) -> Iterator[dict[str, str]]:
    """`prompt`, `reference` and `prediction` of each document of `data`, which is read and laid out as in training.

    The last answer of a document is asked for. limit: of documents; None: all. how: the sampling; absent: greedy, 256
    tokens at most. All model-parallel ranks must iterate. Raises `DataError` for data that cannot be used, and
    `ConfigError` for a `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected a number of documents, 1 or more.")
    corpus = build_corpus(data, model.tokenizer, max_words=model.max_seq_len, dialog=dialog)
    how = how or Sampling.of(temperature=0.0, max_gen_len=256)
    asked = iter(range(len(corpus) if limit is None else min(limit, len(corpus))))
    while numbers := list(islice(asked, BATCH)):
        pairs = [_last_answer(corpus, number) for number in numbers]
        stop_ids = {model.tokenizer.eos_id}.union(*(_end_of(model, reference) for _, reference in pairs))
        answers = _answers(model, [prompt for prompt, _ in pairs], frozenset(stop_ids), how)
        for (prompt, reference), answer in zip(pairs, answers, strict=True):
            reference = reference[:-1] if reference[-1] in stop_ids else reference
            texts = map(model.tokenizer.decode, (prompt, reference, answer))
            yield dict(zip(("prompt", "reference", "prediction"), texts, strict=True))


def _last_answer(corpus: Corpus, number: int) -> tuple[list[int], list[int]]:
    """(tokens before the last learned ones, these) of a document."""
    span = slice(corpus.offsets[number], corpus.offsets[number + 1])
    tokens, learned = corpus.tokens[span].tolist(), corpus.learned[span]
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    begin, end = [(begin, end) for begin, end in pairwise(edges) if learned[begin]][-1]
    begin = max(begin, 1)  # where all is learned, as of plain text, the first token is the question
    return tokens[:begin], tokens[begin:end]


def _end_of(model: MetaModel, answer: list[int]) -> set[int]:
    """The control token by which a chat template ends this answer, if one does."""
    return {answer[-1]} & model.tokenizer.control_tokens().keys()


def _answers(model: MetaModel, prompts: list[list[int]], stop_ids: frozenset[int], how: Sampling) -> list[list[int]]:
    """The tokens of each answer, without the one that ends it."""
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in model.steps(prompts, stop_ids, how):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return answers
