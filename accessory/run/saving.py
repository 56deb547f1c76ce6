"""What happens when a run saves: room is made sure of, a checkpoint written, older ones removed, and it is told."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accessory.checkpoint.manifest import MANIFEST_FILE
from accessory.checkpoint.retention import Retention
from accessory.checkpoint.room import check_room, checkpoint_bytes
from accessory.checkpoint.save import CheckpointWriter, gather_whole
from accessory.checkpoint.source import read_json
from accessory.checkpoint.training_state import Progress, collect_training_state, state_record
from accessory.optim import state_bytes
from accessory.parallel.agree import on_main
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import Slicing
from accessory.run.report import Reporter
from accessory.run.status import RunStatus


@dataclass
class Saver:
    """Saves `weights` (what a checkpoint holds, `trained` or more) and the state of `optimizer`.

    `identity` and `conditions` are those of `state_record`; `keep_last` None keeps everything.
    """

    writer: CheckpointWriter
    weights: dict[str, nn.Parameter]
    trained: dict[str, nn.Parameter]
    slicings: dict[str, Slicing]
    optimizer: torch.optim.Optimizer
    identity: dict[str, Any]
    conditions: dict[str, Any]
    layout: Layout
    reporter: Reporter
    status: RunStatus
    keep_last: int | None = None

    def __post_init__(self) -> None:
        moments = self.layout.mp_size * state_bytes(self.identity["optim"], self.trained)
        self.needed = checkpoint_bytes(self.weights, self.slicings, self.layout.mp_size, moments)
        self.retention = Retention(self.writer.output_dir, self.keep_last) if self.keep_last else None

    def check_room(self) -> None:
        """Raise `DiskFullError`, on all ranks, where a checkpoint has no room. A collective."""
        on_main(check_room, self.writer.output_dir, self.needed)

    def __call__(self, progress: Progress, name: str, loss: float | None) -> None:
        """Write the checkpoint `name`; `loss` is the mean of the steps since the one before. A collective.

        Raises `CheckpointError`, on all ranks, where it could not be written; what was saved before is whole then.
        """
        began = time.monotonic()
        self.check_room()
        weights = gather_whole(self.weights, self.slicings)
        state = collect_training_state(self.optimizer, self.trained, self.slicings)
        record = state_record(progress, self.identity, self.conditions)
        path = self.writer.write(name, weights, state, record, progress.total_steps, loss)
        self.status.saved(progress.total_steps, path)
        if self.layout.is_main:
            self._after(path, time.monotonic() - began)

    def _after(self, path: Path, seconds: float) -> None:
        files = read_json(path / MANIFEST_FILE)["files"]
        size = sum(entry["bytes"] for entry in files.values())
        self.reporter.say(f"saved {path} ({size / 1e6:,.1f} MB in {seconds:.2f} s)")
        for fault in self.retention.prune() if self.retention else ():
            self.reporter.say(fault)
