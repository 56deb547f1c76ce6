"""Tasks of EleutherAI's lm-eval harness on a model (extra `eval`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.errors import ConfigError, DataError, nearest
from accessory.eval.task_data import TaskData
from accessory.meta import MetaModel

if TYPE_CHECKING:
    from lm_eval.api.model import LM

SEED = 1234  # by which the harness chooses examples unless told


@dataclass(frozen=True)
class TaskFigures:
    """Of a task, or of a group of them: each metric with its standard error, and from how many documents.

    seconds: that the whole task took; nan of a member of a group. predictions: what the harness says of each document.
    num_fewshot: examples that stood before each question; None of a group, whose members say.
    """

    name: str
    metrics: dict[str, tuple[float, float | None]]
    documents: int
    seconds: float
    predictions: list[dict[str, Any]] = field(default_factory=list)
    members: tuple[TaskFigures, ...] = ()
    num_fewshot: int | None = None


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run. num_fewshot: None for each task's own; limit: documents of a task; tokens_at_once: of a batch.

    task_data: where tasks find their files instead of the Hub. protocol: of `accessory.eval.encoding`.
    """

    num_fewshot: int | None = None
    limit: int | None = None
    task_data: Path | None = None
    protocol: str = "0.4"
    tokens_at_once: int | None = None
    shows: bool = False


class Harness:
    """The harness's tasks, for one model. Every rank makes one, and calls it alike."""

    def __init__(self, model: MetaModel | None, settings: TaskSettings, asked: LM | None = None) -> None:
        """asked: another model than ours, as the harness knows models.

        Raises `ConfigError` where lm-eval is not installed, and for settings that cannot be.
        """
        try:
            from lm_eval.tasks import TaskManager

            from accessory.eval.harness_model import HarnessModel
        except ImportError as error:
            raise ConfigError(f"Tasks need lm-eval ({error}): pip install -e '.[eval]'.") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are of settings that are made here
        self._settings = settings
        self._data = TaskData(settings.task_data) if settings.task_data else None
        self._asked = asked or HarnessModel(model, settings.protocol, settings.tokens_at_once, settings.shows)
        self._manager = TaskManager()

    def check(self, names: list[str]) -> None:
        """Raise `ConfigError` naming tasks that there are not, with the nearest that there are."""
        known = self._manager.all_tasks
        faults = [f"Task {name!r} is unknown.{nearest(name, known)}" for name in names if name not in known]
        if faults:
            raise ConfigError("\n".join([*faults, "`lm-eval ls tasks` lists all."]))

    def run(self, name: str) -> TaskFigures:
        """A task's, or a group's, figures. Raises `DataError` for data that is not there."""
        from lm_eval import evaluate

        began = time.monotonic()
        with self._reading(name):
            loaded = self._manager.load([name])
            for task in loaded["tasks"].values():
                self._set_examples(task)
            results = evaluate(self._asked, loaded, limit=self._settings.limit)
        return _figures(name, results, time.monotonic() - began)

    def _set_examples(self, task: Any) -> None:
        """How many examples a task shows, and the seed of their choice: as the harness's own command does."""
        stated, wanted = task.get_config("num_fewshot"), self._settings.num_fewshot
        if stated is None or (wanted is not None and stated != 0):  # a stated 0 means that it has none to show
            task.set_config("num_fewshot", wanted or 0)
        task.set_fewshot_seed(SEED)

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Inside this context tasks read from `task_data`, where that is given."""
        import datasets

        fetch = datasets.load_dataset
        if self._data:
            datasets.load_dataset = self._data.load  # by which the harness loads all that its tasks name
        try:
            yield
        except AssertionError as error:
            if "no documents available" in str(error) or "number of fewshot" in str(error):
                raise DataError(
                    f"{name}: {self._settings.num_fewshot} examples (--num_fewshot) are taken from its training file, "
                    f"which has fewer or is missing in {self._settings.task_data}; expected train.jsonl (with "
                    "train-labels.lst where answers lie apart), ARC-Easy-Train.jsonl, or MMLU's _dev.csv."
                ) from error
            raise
        except OSError as error:
            if self._data:
                raise
            raise DataError(
                f"{name}: its data cannot be fetched ({type(error).__name__}: {str(error)[:200]}). Without a network, "
                "give a directory of its files: --task_data DIR."
            ) from error
        finally:
            datasets.load_dataset = fetch


def _figures(name: str, results: dict[str, Any], seconds: float) -> TaskFigures:
    samples, counts = results["samples"], {key: n["effective"] for key, n in results["n-samples"].items()}
    shown = results["n-shot"]
    members = tuple(
        TaskFigures(
            key, _metrics(results["results"][key]), counts[key], float("nan"), samples[key], num_fewshot=shown[key]
        )
        for key in sorted(samples) if key != name
    )  # fmt: skip
    metrics = _metrics(results["results"][name]) if name in results["results"] else {}
    documents = counts.get(name, sum(member.documents for member in members))
    own = shown[name] if name in samples else None
    return TaskFigures(name, metrics, documents, seconds, samples.get(name, []), members, own)


def _metrics(row: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """The harness's `acc,none` and `acc_stderr,none` as a pair; of another filter than none, it is named behind."""
    found = {}
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = row.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            found[name] = float(value), float(error) if isinstance(error, int | float) else None
    return found
