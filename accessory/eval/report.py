"""Figures as a table, as one object of JSON, and predictions as JSON Lines."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accessory.eval.harness import TaskFigures
from accessory.eval.statistics import Figure

COLUMNS = ("task", "shots", "metric", "value", "stderr", "documents", "seconds")


def table(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """Rows of words under the names of their columns, as Markdown; words to the left, numbers to the right."""
    lines = [columns, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(columns))]
    right = [all(_is_number(row[place]) for row in rows) for place in range(len(columns))]
    laid = [
        "| "
        + " | ".join(word.rjust(w) if r else word.ljust(w) for word, w, r in zip(line, widths, right, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([laid[0], rule, *laid[1:]])


def _is_number(word: str) -> bool:
    return not word or word.replace(".", "").replace(",", "").replace("-", "").isdigit()


def task_rows(figures: TaskFigures) -> Iterator[list[str]]:
    """A row for each metric, and below them those of a group's members."""
    for place, (metric, (value, error)) in enumerate(figures.metrics.items()):
        seconds = f"{figures.seconds:.1f}" if not place and math.isfinite(figures.seconds) else ""
        count = str(figures.documents) if not place else ""
        name = figures.name if not place else ""
        shots = str(figures.num_fewshot) if not place and figures.num_fewshot is not None else ""
        yield [name, shots, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", count, seconds]
    for member in figures.members:
        yield from task_rows(member)


def task_object(figures: TaskFigures) -> dict[str, Any]:
    """Each metric and its `_stderr` by name, `documents`, `num_fewshot`, `seconds`, and `members` of a group."""
    found: dict[str, Any] = {}
    for metric, (value, error) in figures.metrics.items():
        found |= {metric: value, f"{metric}_stderr": error}
    found |= {"documents": figures.documents}
    if figures.num_fewshot is not None:
        found["num_fewshot"] = figures.num_fewshot
    if math.isfinite(figures.seconds):
        found["seconds"] = round(figures.seconds, 3)
    return found | ({"members": {m.name: task_object(m) for m in figures.members}} if figures.members else {})


def figure_rows(name: str, figures: Mapping[str, Figure]) -> Iterator[list[str]]:
    """A row for each figure: what it is of, its value and its error."""
    for place, (what, (value, error)) in enumerate(figures.items()):
        yield [name if not place else "", what, f"{value:.4f}", "" if math.isnan(error) else f"{error:.4f}"]


def figure_object(figures: Mapping[str, Figure]) -> dict[str, dict[str, float | None]]:
    """By name: value and stderr, null where there is none."""
    return {
        what: {"value": value, "stderr": None if math.isnan(error) else error}
        for what, (value, error) in figures.items()
    }


def write_predictions(path: Path, all_figures: Sequence[TaskFigures]) -> None:
    """A line for each document: task, doc_id, the document, its target, requests, responses, and its own metrics."""
    with path.open("w", encoding="utf-8") as file:
        for figures in all_figures:
            for part in (figures, *figures.members):
                for sample in part.predictions:
                    file.write(json.dumps(_prediction(part.name, sample), ensure_ascii=False, default=str) + "\n")


def _prediction(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    kept = ("doc_id", "doc", "target", "filtered_resps")
    metrics = {name: sample[name] for name in sample["metrics"]}
    line = {"task": task, **{key: sample[key] for key in kept}, "requests": sample["arguments"], **metrics}
    line["responses"] = line.pop("filtered_resps")
    return line
