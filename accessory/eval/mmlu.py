"""MMLU as qlora keeps it: lines of JSON with `subject`, `input` and `output`, one of the letters A to D.

Every line is one document with its own subject, on however many ranks: qlora paired rows with subjects by place, which
several processes misalign, and asked its zero-shot file for subjects that it had dropped.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from accessory.data.readers.json_lines import read_lines
from accessory.errors import DataError
from accessory.eval.encoding import Encoding
from accessory.eval.scoring import likelihoods
from accessory.eval.statistics import Figure, mean, mean_of_means
from accessory.meta import MetaModel
from accessory.run.report import TaskReport

LETTERS = ("A", "B", "C", "D")
LONGEST = 2048
"""Tokens of a question that are read while a model is trained, whose own documents may be shorter: qlora's number."""


class Item(NamedTuple):
    """A question with its choices and perhaps examples before it, and the letter that answers it."""

    subject: str
    question: str
    answer: str


class MmluFigures(NamedTuple):
    """accuracy: the mean over subjects, each counting alike. loss: the mean over questions of -log p of the letter."""

    accuracy: Figure
    loss: Figure
    subjects: dict[str, Figure]
    documents: int


def read_mmlu(path: Path, most: int | None = None) -> list[Item]:
    """The questions of a file; at most so many, spread over its subjects.

    Raises `DataError` naming the line of a record that is no question.
    """
    items = []
    for record in read_lines(path):
        subject, question, answer = (record.fields.get(key) for key in ("subject", "input", "output"))
        if record.fault or not (isinstance(subject, str) and isinstance(question, str) and answer in LETTERS):
            said = record.fault or f"has {sorted(record.fields)} and the output {answer!r}"
            raise DataError(f"{path}:{record.line}: {said}; expected subject, input, and an output of A, B, C or D.")
        items.append(Item(subject, question, answer))
    if not items:
        raise DataError(f"{path}: holds no question; expected lines with subject, input and output.")
    return items if most is None else _spread(items, most)


def _spread(items: list[Item], most: int) -> list[Item]:
    """The first of each subject, then the second of each, ..."""
    seen: Counter[str] = Counter()
    rounds = [(seen.update([item.subject]) or seen[item.subject], place) for place, item in enumerate(items)]
    return [items[place] for _, place in sorted(rounds)[:most]]


def mmlu(
    model: MetaModel, items: Sequence[Item], tokens_at_once: int | None = None, longest: int | None = None
) -> MmluFigures:
    """Accuracy and loss of a model: its answer is the likeliest of the letters. All ranks must call it alike.

    tokens_at_once, longest: as in `likelihoods`.
    """
    pairs = [(item.question, f" {letter}") for item in items for letter in LETTERS]
    found = likelihoods(model, Encoding(model.tokenizer).continuations(pairs), tokens_at_once, longest=longest)
    right, losses = defaultdict(list), []
    for number, item in enumerate(items):
        scores = [each.log_p for each in found[number * len(LETTERS) : (number + 1) * len(LETTERS)]]
        wanted = LETTERS.index(item.answer)
        right[item.subject].append(float(max(range(len(LETTERS)), key=scores.__getitem__) == wanted))
        losses.append(-scores[wanted])
    subjects = {subject: mean(hits) for subject, hits in sorted(right.items())}
    return MmluFigures(mean_of_means(list(right.values())), mean(losses), subjects, len(items))


def mmlu_report(
    model: MetaModel, items: Sequence[Item], tokens_at_once: int | None = None, longest: int | None = None
) -> TaskReport:
    """The same while a model is trained: `mmlu_accuracy`, `mmlu_loss`, and `mmlu_accuracy/SUBJECT` of each subject."""
    most = model.llma.args.longest_document
    found = mmlu(model, items, tokens_at_once, min(longest, most) if longest and most else longest)
    subjects = {f"mmlu_accuracy/{subject}": figure.value for subject, figure in found.subjects.items()}
    (accuracy, error), (loss, _) = found.accuracy, found.loss
    shown = f"{accuracy:.4f}" if math.isnan(error) else f"{accuracy:.4f} +- {error:.4f}"
    words = f"mmlu: accuracy {shown} over {len(subjects)} subjects, loss {loss:.4f} | {found.documents:,} questions"
    return TaskReport(words, {"mmlu_accuracy": accuracy, "mmlu_loss": loss, **subjects})
