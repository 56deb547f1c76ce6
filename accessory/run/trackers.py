"""Where a run's figures go beside its own log: TensorBoard's event files, Weights & Biases."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

_LOST = 10  # at most so many seconds of TensorBoard's figures are lost if a process is killed; its default is 120
_PROJECT = "accessory"  # of Weights & Biases, where WANDB_PROJECT names none


class Tracker(Protocol):
    """Takes figures and texts by name and step. name: of what it writes, for messages."""

    name: str

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record figures."""

    def texts(self, tag: str, pairs: Sequence[tuple[str, str]], step: int) -> None:
        """Record questions and their answers."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in `directory`. What older ones there hold for `first_step` and later steps no longer counts."""

    def __init__(self, directory: Path, first_step: int) -> None:
        _leave_second_of_older_events(directory)
        self.name = f"{directory}/events.*"
        self.writer = SummaryWriter(str(directory), purge_step=first_step, flush_secs=_LOST)

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record figures."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def texts(self, tag: str, pairs: Sequence[tuple[str, str]], step: int) -> None:
        """Record questions and their answers, each as a text of its own, as they are and not as Markdown."""
        for number, pair in enumerate(pairs):
            quoted = (f"    {part.replace(chr(10), chr(10) + '    ')}" for part in pair)
            self.writer.add_text(f"{tag}/{number}", "\n\n&nbsp;\n\n".join(quoted), step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb's, whose own variables (WANDB_MODE, WANDB_PROJECT, WANDB_NAME, ...) count as always."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        import wandb

        self.name = "wandb"
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", directory.absolute().name),
            dir=str(directory),
            config=settings,
        )
        self._table = wandb.Table

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Record figures."""
        self.run.log(values, step=step)

    def texts(self, tag: str, pairs: Sequence[tuple[str, str]], step: int) -> None:
        """Record questions and their answers as a table."""
        if pairs:
            self.run.log({tag: self._table(columns=["question", "answer"], data=[*map(list, pairs)])}, step=step)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


def make_trackers(names: Sequence[str], directory: Path, first_step: int, settings: dict[str, Any]) -> list[Tracker]:
    """Those that `--report_to` names. settings: of the run, JSON-like."""
    found: list[Tracker] = []
    if "tensorboard" in names:
        found.append(TensorBoard(directory, first_step))
    if "wandb" in names:
        found.append(WeightsAndBiases(directory, settings))
    return found


def _leave_second_of_older_events(directory: Path) -> None:
    """Wait, a second at most, until a new event file's name has a later second than those in `directory`.

    TensorBoard reads event files in the order of their names: second, host, process, count; the last two as text, by
    which "10" comes before "9".
    """
    seconds = {path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*")}
    while str(int(time.time())) in seconds:
        time.sleep(0.05)
