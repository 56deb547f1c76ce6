"""What a model answers to the questions of a data file, beside the answers that the file expects."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, islice, pairwise
from pathlib import Path

import numpy as np

from accessory.data.corpus import Corpus, build_corpus
from accessory.data.layouts import Trained
from accessory.data.pictures import TRANSFORMS, UNCROPPED, Picture
from accessory.data.templates import CHAT, DIALOG, PROMPT_LAYOUTS
from accessory.errors import ConfigError, check_known
from accessory.meta import MetaModel, Sampling

BATCH = 8
"""Questions answered together."""


def questions(
    model: MetaModel, data: Path, prompt_layout: str | None = None, image_transform: str = UNCROPPED
) -> Corpus:
    """The documents of `data`, their questions laid out as the model was trained on them.

    Of a base they are laid out as for training. prompt_layout: one of `PROMPT_LAYOUTS`, for all questions.
    image_transform: one of `TRANSFORMS`, for records with an image. Raises `DataError` for data that cannot be used,
    `ConfigError` for a layout or a transform that we do not have, `TokenizerError` for `chat` without a chat template.
    """
    check_known("image transform", image_transform, TRANSFORMS)
    if prompt_layout is not None:
        check_known("prompt layout", prompt_layout, PROMPT_LAYOUTS)
    trained = Trained(model.prompt_layouts, model.system, prompt_layout)
    sees = {"pictures": model.vision and model.vision.place, "image_transform": image_transform}
    return build_corpus(data, model.tokenizer, max_words=model.max_seq_len, trained=trained, **sees)


def predictions(
    model: MetaModel, corpus: Corpus, *, limit: int | None = None, how: Sampling | None = None
) -> Iterator[dict[str, str]]:
    """`prompt`, `reference` and `prediction` of each document of `questions`.

    The last answer of a document is asked for, and ends as in training. limit: of documents; None: all. how: the
    sampling; absent: greedy, 256 tokens at most. All model-parallel ranks must iterate. Raises `ConfigError` for a
    `limit` below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected a number of documents, 1 or more.")
    how = how or Sampling.of(temperature=0.0, max_gen_len=256)
    documents = range(len(corpus) if limit is None else min(limit, len(corpus)))
    layouts = corpus.told.layouts
    for layout, alike in groupby(documents, key=lambda number: layouts[corpus.origins[number, 0]]):
        stop_ids = model.chat.stop_ids if layout == CHAT else model.tokenizer.stop_ids
        while numbers := list(islice(alike, BATCH)):
            pairs, dialog = [_last_answer(corpus, number) for number in numbers], layout == DIALOG
            pictures = [_picture(model, corpus, number) for number in numbers]
            asked = [model.with_rows(prompt, picture) for (prompt, _), picture in zip(pairs, pictures, strict=True)]
            answers = model.whole_answers(asked, stop_ids, how, [dialog] * len(pairs), pictures=pictures)
            for (prompt, reference), answer in zip(pairs, answers, strict=True):
                reference = reference[:-1] if reference[-1] in stop_ids else reference
                yield {
                    "prompt": model.tokenizer.decode(prompt),
                    "reference": model.answer_text(reference, dialog),
                    "prediction": answer,
                }


def _picture(model: MetaModel, corpus: Corpus, number: int) -> Picture | None:
    """That of a document, read here: a fault is found by all ranks alike."""
    insets = corpus.insets(number)
    return model.picture(insets[0].content) if insets else None


def _last_answer(corpus: Corpus, number: int) -> tuple[list[int], list[int]]:
    """(tokens before the last learned ones, these) of a document, without the rows of a picture."""
    span = slice(corpus.offsets[number], corpus.offsets[number + 1])
    tokens, learned = corpus.tokens[span].tolist(), corpus.learned[span]
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(tokens)]
    begin, end = [(begin, end) for begin, end in pairwise(edges) if learned[begin]][-1]
    begin = max(begin, 1)  # where all is learned, as of plain text, the first token is the question
    return tokens[:begin], tokens[begin:end]
