"""Saves a run: checks the disk space, writes a checkpoint, removes older ones, and reports it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.disk_space import check_disk_space, checkpoint_bytes
from accessory.checkpoint.manifest import MANIFEST_FILE
from accessory.checkpoint.run_checkpoints import Retention, link_best, remove
from accessory.checkpoint.save import CheckpointWriter
from accessory.checkpoint.source import read_json
from accessory.checkpoint.training_state import ORDER, Progress, WorkingValues, collect_training_state, state_record
from accessory.checkpoint.validation_state import ValidationState
from accessory.data.order import Order
from accessory.optim import state_bytes
from accessory.parallel.agree import on_main
from accessory.parallel.groups import Layout, supervised
from accessory.parallel.parameters import NamedParameters
from accessory.run.report import Reporter
from accessory.run.status import RunStatus


@dataclass
class Saver:
    """Saves `weights` (what a checkpoint holds, `trained` or more) and the state of `optimizer`.

    `identity` and `conditions` are those of `state_record`. `keep_last` None keeps everything. `validation`: what
    evaluations have found so far, if there are any. `losses`: of the steps since the last save that were not skipped; a
    checkpoint records their mean. order: of the data, whose state is saved, too. working: what else the training state
    holds.
    """

    writer: CheckpointWriter
    weights: NamedParameters
    trained: NamedParameters
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    conditions: dict[str, Any]
    layout: Layout
    reporter: Reporter
    status: RunStatus
    keep_last: int | None = None
    validation: ValidationState | None = None
    working: WorkingValues | None = None
    order: Order | None = None
    losses: list[float] = field(default_factory=list, init=False)
    saved_at: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        moments = self.layout.mp_size * state_bytes(self.identity["optim"], self.trained)
        if self.working:
            moments += self.layout.mp_size * sum(4 * p.numel() for p in self.working.parameters.values())
        self.needed = checkpoint_bytes(self.weights, self.layout.mp_size, moments)
        self.retention = Retention(self.writer.output_dir, self.keep_last) if self.keep_last else None

    def check_disk_space(self) -> None:
        """Raise `DiskFullError`, on all ranks, if a checkpoint does not fit on the disk. A collective."""
        on_main(check_disk_space, self.writer.output_dir, self.needed)

    def is_due(self, minutes: float | None) -> bool:
        """Whether the last save is at least so many minutes ago; never, if None."""
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def __call__(self, progress: Progress, only_best: bool = False) -> None:
        """Write a checkpoint of the run at `progress`. A collective.

        only_best: nothing but the lowest validation loss asks for it, so that it goes once there is a better one.
        Raises `CheckpointError`, on all ranks, if it could not be written; earlier checkpoints are then intact.
        """
        with supervised():
            self.write(progress, sum(self.losses) / len(self.losses) if self.losses else None, only_best)
        self.losses, self.saved_at = [], time.monotonic()

    def write(self, progress: Progress, loss: float | None, only_best: bool) -> None:
        """The work of a save; `loss` is the mean since the last one, None if every step since was skipped."""
        began = time.monotonic()
        self.check_disk_space()
        state = collect_training_state(self.optimizer, self.trained, self.working)
        remembered = self.order.state(progress.epoch, progress.step) if self.order else {}
        state |= {f"{ORDER}{name}": torch.from_numpy(values) for name, values in remembered.items()}
        former = self._note_best(progress, only_best)
        record = state_record(progress, self.identity, self.conditions, self.validation)
        name, weights = progress.checkpoint_name, self.weights.gathered()
        path = self.writer.write(name, weights, state, record, progress.total_steps, loss)
        self.status.saved(progress.total_steps, path)
        if self.layout.is_main:
            size = sum(entry["bytes"] for entry in read_json(path / MANIFEST_FILE)["files"].values())
            self.reporter.say(f"saved {path} ({size / 1e6:,.1f} MB in {time.monotonic() - began:.2f} s)")
            for fault in self._tidy(path, former):
                self.reporter.say(fault)

    def point_at_best(self) -> list[str]:
        """Say in `output_dir` which checkpoint is the best so far, as a resumed run knows it; returns what fails."""
        state = self.validation
        if state is None or state.checkpoint is None or not self.layout.is_main:
            return []
        path = self.writer.output_dir / state.checkpoint
        if not path.is_dir():
            return [
                f"the checkpoint with the lowest validation loss so far, {state.checkpoint}, is not in {path.parent}"
            ]
        self.status.best(path, state.best_step, state.best)
        return [fault for fault in [link_best(path)] if fault]

    def _note_best(self, progress: Progress, only_best: bool) -> str | None:
        """Name what is saved now as the best, if it is; returns the one that it makes superfluous, if any."""
        state = self.validation
        if state is None or state.best_step != progress.total_steps:
            return None
        former = state.checkpoint if state.only_best else None
        state.checkpoint, state.only_best = progress.checkpoint_name, only_best
        return former if former != state.checkpoint else None

    def _tidy(self, path: Path, former: str | None) -> Iterator[str]:
        """Point at the best checkpoint, if that is the new one at `path`, and remove older ones; yields what fails."""
        best = self.validation and self.validation.checkpoint
        if best == path.name:
            yield from self.point_at_best()
            if former and (path.parent / former).is_dir() and (fault := remove(path.parent / former)):
                yield fault
        if self.retention:
            yield from self.retention.prune(best)
