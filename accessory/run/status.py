"""`run_status.json`: how a run stands or ended, for schedulers; torchrun itself ends with 1 after any failure."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from accessory.errors import AccessoryError, Preempted, TrainingError
from accessory.parallel.launcher import launch_name, restart_count

STATUS_FILE = "run_status.json"
_FRUITLESS = 3  # attempts that all began after the same step: the next would end as they did


class RunStatus:
    """Writes `output_dir/run_status.json` on the main rank, or on the one that prints an error; None writes nothing.

    Its keys: state (running, finished, preempted, failed), status (what the process exits with; null while it runs),
    reason (the kind of error), message, step and checkpoint (the last saved), best (checkpoint, step and loss of the
    lowest validation loss; absent without one), attempt, began_after (the step each attempt in a row began after),
    launch (of `launch_name`), ranks, host, process, started, updated.
    """

    def __init__(self, output_dir: Path | None, ranks: int, is_main: bool) -> None:
        self.output_dir, self.is_main = output_dir, is_main
        self.before = read_status(output_dir) if is_restart_of_same_launch(output_dir) else {}
        self.entries: dict[str, Any] = {
            "state": "running", "status": None, "reason": None, "message": None,
            "step": self.before.get("step"), "checkpoint": self.before.get("checkpoint"),
            "attempt": restart_count(), "began_after": self.before.get("began_after", []),
            "launch": launch_name(), "ranks": ranks, "host": socket.gethostname(), "process": os.getpid(),
            "started": _now(),
        }  # fmt: skip

    def begin(self, step: int) -> None:
        """This attempt goes on after `step`. Raises `TrainingError` if the last ones did so too, and saved nothing."""
        self.entries["began_after"] = [*self.entries["began_after"], step][-_FRUITLESS:]
        self._write(self.is_main)
        if restart_count() and self.entries["began_after"] == [step] * _FRUITLESS:
            raise TrainingError(
                f"No progress since step {step}: {_FRUITLESS} attempts in a row began there and none saved a "
                f"checkpoint. The last one ended with: {self.before.get('message') or 'no word'}"
            )

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is whole."""
        self.entries |= {"step": step, "checkpoint": checkpoint.name}
        self._write(self.is_main)

    def best(self, checkpoint: Path, step: int, loss: float) -> None:
        """This checkpoint has the lowest validation loss so far."""
        self.entries["best"] = {"checkpoint": checkpoint.name, "step": step, "loss": loss}
        self._write(self.is_main)

    def end(self, error: AccessoryError | None) -> None:
        """The run is over; `error` is why, if it did not finish."""
        state = "finished" if error is None else "preempted" if isinstance(error, Preempted) else "failed"
        self.entries |= {"state": state, "status": error.status if error else 0}
        if error:
            self.entries |= {"reason": type(error).__name__, "message": str(error)}
        self._write(error.prints if error else self.is_main)

    def _write(self, wanted: bool) -> None:
        if self.output_dir is None or not wanted:
            return
        path = self.output_dir / STATUS_FILE
        partial = path.with_name(f".{STATUS_FILE}.{os.getpid()}")
        try:
            partial.write_text(json.dumps(self.entries | {"updated": _now()}, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        except OSError as error:  # a full disk, perhaps, which is just what ends the run
            print(f"{path}: cannot be written ({error.strerror})", file=sys.stderr, flush=True)


def is_restart_of_same_launch(output_dir: Path | None) -> bool:
    """Whether this is a later attempt of the launch that last began to train in `output_dir`.

    If the first attempt ended before it trained, it is not: what lies there is then another run's.
    """
    was = read_status(output_dir) if output_dir and restart_count() else {}
    return bool(was.get("began_after")) and was.get("launch") == launch_name()


def read_status(output_dir: Path) -> dict[str, Any]:
    """What `run_status.json` says; empty where there is none, or it cannot be read."""
    try:
        found = json.loads((output_dir / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
