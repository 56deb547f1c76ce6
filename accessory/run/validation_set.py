"""What a run is evaluated on: its documents, read before any weight, and the questions it answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from accessory.blueprint import Blueprint
from accessory.config import FinetuneConfig
from accessory.data.corpus import Corpus, build_corpus
from accessory.data.held_out import held_out, in_common
from accessory.data.order import GlobalOrder
from accessory.errors import DataError
from accessory.parallel.groups import Layout
from accessory.tokenizer.sniff import what_is

_QUESTIONS = (".txt", ".json")  # of files of --sample_prompts


@dataclass(frozen=True)
class ValidationSet:
    """Documents `ids` of `corpus`, int64, and `questions`. `digest` is that of the documents.

    answer_tokens: the most tokens of an answer to a question. threads: that read images.
    """

    corpus: Corpus
    ids: np.ndarray
    digest: str
    questions: list[str]
    answer_tokens: int = 0
    threads: int = 0

    @property
    def sources(self) -> list[str]:
        """A name for each of the corpus's entries: its file's, with as much of the path as tells them apart."""
        paths = [Path(file) for file in self.corpus.omissions.files]
        names = [path.name for path in paths]
        names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]
        seen: Counter[str] = Counter()
        for place, name in enumerate(names):
            seen[name] += 1
            names[place] = name if seen[name] == 1 else f"{name} ({seen[name]})"
        return names

    def order(self, layout: Layout, most_tokens: int) -> GlobalOrder:
        """All of them as one step's micro-batches, none larger than `most_tokens`, if a single document is not."""
        return GlobalOrder(
            self.corpus,
            batch_size=len(self.ids),
            accum_iter=1,
            dp_rank=layout.dp_rank,
            dp_size=layout.dp_size,
            max_tokens=max(most_tokens, int(self.corpus.lengths[self.ids].max())),
            ids=self.ids,
            trains=False,
            threads=self.threads,
        )


def divide(
    config: FinetuneConfig, blueprint: Blueprint, corpus: Corpus, how: dict[str, Any]
) -> tuple[np.ndarray | None, ValidationSet | None, list[str]]:
    """(documents of `corpus` to train on, None for all; what to evaluate on, if anything; what to tell the user).

    how: the arguments of `build_corpus`. Raises `DataError` where one of the two would be empty, or cannot be read.
    """
    questions = read_questions(config.sample_prompts)
    more = {"answer_tokens": config.sample_tokens, "threads": config.num_workers}
    if config.val_data:
        other = _read(config, blueprint, how)
        notes = [f"validation: {other.report}"]
        if common := in_common(other, corpus):
            notes.append(f"{common:,} of its records are trained on, too: figures on them do not tell what was learned")
        notes += other.check_lengths(blueprint.args.longest_document, blueprint.args.stated_length)
        return None, whole_set(other, questions, **more), notes
    if config.val_split is None:
        return None, None, []
    chosen = held_out(corpus, config.val_split)
    ids, trained_on = np.flatnonzero(chosen), np.flatnonzero(~chosen)
    said = f"{len(ids):,} of {len(corpus):,} documents are held out, {int(corpus.supervised[ids].sum()):,} supervised"
    digest = f"{corpus.fingerprint} {config.val_split}"
    found = ValidationSet(corpus, ids, digest, questions, **more)
    return trained_on, found, [f"validation: {said} tokens"]


def whole_set(corpus: Corpus, questions: Sequence[str] = (), **more: int) -> ValidationSet:
    """All documents of a corpus; `more`: further fields of the set."""
    return ValidationSet(corpus, np.arange(len(corpus)), corpus.fingerprint, [*questions], **more)


def _read(config: FinetuneConfig, blueprint: Blueprint, how: dict[str, Any]) -> Corpus:
    try:
        return build_corpus(config.val_data, blueprint.tokenizer, **how)
    except DataError as error:
        raise DataError(f"--val_data: {error}") from error


def read_questions(given: list[str]) -> list[str]:
    """The questions of `--sample_prompts`: as they stand there, or in files, a line each or a JSON list of texts.

    Raises `DataError` for a file that is missing or empty, or holds anything else.
    """
    return [question for word in given for question in (_in_file(Path(word)) if _names_file(word) else [word])]


def _names_file(word: str) -> bool:
    return word.lower().endswith(_QUESTIONS) and "\n" not in word


def _in_file(path: Path) -> list[str]:
    expected = "expected a question a line (.txt) or a JSON list of texts (.json)"
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = (
            json.loads(text) if path.suffix.lower() == ".json" else [line for line in text.splitlines() if line.strip()]
        )
    except OSError as error:
        raise DataError(f"--sample_prompts {path}: cannot be read ({error.strerror}); {expected}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"--sample_prompts {path}: found {what_is(path)} ({error}); {expected}.") from error
    if not isinstance(found, list) or not found or not all(isinstance(item, str) and item.strip() for item in found):
        raise DataError(f"--sample_prompts {path}: found {what_is(path)}; {expected}.")
    return found
