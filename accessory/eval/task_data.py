"""The files of zero-shot tasks as their publishers lay them out, as the data sets that the harness's tasks read."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from accessory.data.readers.json_lines import read_lines
from accessory.errors import DataError

Row = dict[str, Any]
SPLITS = {"train": "train", "dev": "validation", "val": "validation", "valid": "validation", "test": "test"}
_QUOTED = {"true": 1, "false": 0}  # as OpenCompass's copies of SuperGLUE have them
OPTIONAL = ("train", "dev")
"""Splits of which tasks take examples only: without their files, a task of no examples runs all the same."""


class Kind(NamedTuple):
    """A published data set. keys: by which its records are known. words: of which its path must hold one, if any.

    row: a record as the task reads it. labels: the key of answers that lie in a file beside, one a line.
    """

    name: str
    keys: frozenset[str]
    row: Callable[[Row], Row]
    words: tuple[str, ...] = ()
    labels: str | None = None


def _question(record: Row, asked: str) -> Row:
    stem, choices = record["question"]["stem"], record["question"]["choices"]
    laid_out = {key: [choice[key] for choice in choices] for key in ("text", "label")}
    return {"id": record["id"], asked: stem, "choices": laid_out, "answerKey": record["answerKey"]}


def _labelled(record: Row, key: str = "label") -> Row:
    label = _QUOTED.get(record[key], record[key])
    return {**{name: value for name, value in record.items() if name != key}, "label": int(label)}


def _winogrande(record: Row) -> Row:
    return {key: str(record[key]) for key in ("sentence", "option1", "option2", "answer")}


def _hellaswag(record: Row) -> Row:
    kept = ("activity_label", "ctx_a", "ctx_b", "endings")
    return {**{key: record[key] for key in kept}, "label": str(record["label"])}


_ASKED = frozenset({"id", "question", "answerKey"})
KINDS = (
    Kind("piqa", frozenset({"goal", "sol1", "sol2"}), _labelled, labels="label"),
    Kind("arc_easy", _ASKED, lambda record: _question(record, "question"), ("arc-easy", "arc_easy")),
    Kind("arc_challenge", _ASKED, lambda record: _question(record, "question"), ("arc-challenge", "arc_challenge")),
    Kind("openbookqa", _ASKED, lambda record: _question(record, "question_stem"), ("openbook",)),
    Kind("boolq", frozenset({"passage", "question", "label"}), _labelled),
    Kind("boolq", frozenset({"passage", "question", "answer"}), lambda record: _labelled(record, "answer")),
    Kind("wic", frozenset({"word", "sentence1", "sentence2", "start1", "end1", "label"}), _labelled),
    Kind("winogrande", frozenset({"sentence", "option1", "option2"}), _winogrande, labels="answer"),
    Kind("hellaswag", frozenset({"activity_label", "ctx_a", "ctx_b", "endings", "label"}), _hellaswag),
)  # fmt: skip
_MMLU = re.compile(r"(.+)_(dev|val|test)")
_OF_PATHS = {
    "piqa": "piqa", "hellaswag": "hellaswag", "openbookqa": "openbookqa", "winogrande": "winogrande", "boolq": "boolq",
    "ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge", "wic": "wic",
}  # fmt: skip
"""What the harness calls a data set, its path's last part or its configuration -> a `Kind`'s name."""


class Found(NamedTuple):
    """A file of split `split` of the data set `name`, and the kind that it was known as; None for one of MMLU."""

    name: str
    split: str
    path: Path
    kind: Kind | None


class TaskData:
    """What lies in a directory: published files, and data sets as the Hub keeps them (`OWNER/NAME` or `NAME`)."""

    def __init__(self, directory: Path) -> None:
        """Raises `DataError` for a directory that is not there."""
        if not directory.is_dir():
            raise DataError(f"--task_data {directory}: is no directory.")
        self.directory = directory.resolve()  # its own name may say what is in it
        self.files = list(_found(self.directory))

    def load(self, path: str, name: str | None = None, **how: Any) -> Any:
        """What `datasets.load_dataset(path, name)` would give, from here. Raises `DataError` for what is not here."""
        from datasets import load_dataset

        copied = [self.directory / path, self.directory / Path(path).name]
        if copy := next((place for place in copied if place.is_dir() and self._is_copy(place)), None):
            return load_dataset(str(copy), name, **how)
        wanted = _name_of(path, name)
        files = [file for file in self.files if file.name == wanted]
        if not files:
            there = sorted({file.name for file in self.files})
            raise DataError(
                f"--task_data {self.directory}: holds no data of {path}{f' ({name})' if name else ''}; found "
                f"{', '.join(there) or 'nothing that is known'}. Put its published files there by their own names "
                f"(docs/evaluation.md lists them), or a copy of the data set: hf download {path} "
                f"--repo-type dataset --local-dir {copied[0]}."
            )
        return _Splits(wanted, files, self.directory)

    def _is_copy(self, place: Path) -> bool:
        """Whether a directory is a copy of a data set on the Hub, rather than one of published files."""
        mine = {file.path for file in self.files}
        return not any(path in mine for path in place.rglob("*"))


class _Splits(dict):
    """Split -> `datasets.Dataset`, read when it is asked for."""

    def __init__(self, name: str, files: list[Found], directory: Path) -> None:
        super().__init__()
        self._name, self._directory = name, directory
        self._files: dict[str, Path] = {}
        for file in files:  # of several, such as train_xs to train_xl, the largest
            held = self._files.get(file.split)
            if held is None or file.path.stat().st_size > held.stat().st_size:
                self._files[file.split] = file.path
        self._kinds = {file.path: file.kind for file in files}

    def __missing__(self, split: str) -> Any:
        from datasets import Dataset

        if split not in self._files and split not in OPTIONAL:
            there = ", ".join(f"{key} ({path.name})" for key, path in sorted(self._files.items()))
            raise DataError(f"--task_data {self._directory}: {self._name} lacks its {split} file; found {there}.")
        path = self._files.get(split)
        self[split] = Dataset.from_list([] if path is None else list(_rows(path, self._kinds[path])))
        return self[split]


def _name_of(path: str, name: str | None) -> str:
    """The name under which `TaskData` files a data set that the harness calls so."""
    last = Path(path).name
    if last == "mmlu":
        return f"mmlu {name}"
    return next((kind for key, kind in _OF_PATHS.items() if key in (name, last)), last)


def _found(directory: Path) -> Iterator[Found]:
    """The published files below a directory."""
    for folder, below, names in os.walk(directory):
        below.sort()
        for path in (Path(folder) / name for name in sorted(names)):
            if path.suffix == ".csv" and (match := _MMLU.fullmatch(path.stem)):
                split = {"val": "validation"}.get(match[2], match[2])
                yield Found(f"mmlu {match[1]}", split, path, None)
            elif path.suffix == ".jsonl":
                kind, split = _kind(path, directory), _split(path)
                if kind and split:
                    yield Found(kind.name, split, path, kind)


def _kind(path: Path, directory: Path) -> Kind | None:
    with path.open("rb") as file:
        line = file.readline(1 << 20)
    try:
        record = json.loads(line)
    except ValueError:
        return None
    keys, place = set(record) if isinstance(record, dict) else set(), str(path.relative_to(directory.parent)).lower()
    known = (kind for kind in KINDS if kind.keys <= keys)
    return next((kind for kind in known if not kind.words or any(word in place for word in kind.words)), None)


def _split(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", path.stem.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _rows(path: Path, kind: Kind | None) -> Iterator[Row]:
    """The rows of a file, as the harness's task reads them. Raises `DataError` naming the line of a bad one."""
    if kind is None:
        yield from _mmlu_rows(path)
        return
    records, labels = list(read_lines(path)), _labels(path, kind)
    if labels is not None and len(labels) != len(records):
        raise DataError(
            f"{_beside(path)}: holds {len(labels):,} labels for the {len(records):,} documents of {path.name}; "
            "expected one a line for each of them."
        )
    for number, record in enumerate(records):
        fields = {**record.fields, kind.labels: labels[number]} if labels is not None else record.fields
        try:
            yield kind.row(fields)
        except (KeyError, TypeError, ValueError) as error:
            beside = f"; answers are expected in it, or in {_beside(path).name}" if kind.labels else ""
            wrong = f"lacks {error}" if isinstance(error, KeyError) else repr(error)
            said = record.fault or f"{wrong}{beside}"
            raise DataError(f"{path}:{record.line}: is no record of {kind.name}: {said}.") from error


def _labels(path: Path, kind: Kind) -> list[str] | None:
    """The answers beside a file, where they lie in one of their own."""
    answers = _beside(path)
    return answers.read_text().split() if kind.labels and answers.exists() else None


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-labels.lst")


def _mmlu_rows(path: Path) -> Iterator[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.reader(file), 1):
            if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
                raise DataError(f"{path}:{number}: {str(row)[:200]}; expected a question, 4 choices and A, B, C or D.")
            yield {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5])}
