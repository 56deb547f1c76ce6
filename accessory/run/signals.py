"""Signals that ask a run to stop: remembered until a step is whole, so that what is saved is one step on all ranks."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from accessory.errors import Preempted
from accessory.parallel.launcher import outlive_launcher

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Of torchrun and schedulers, of the keyboard, and of `sbatch --signal=USR1@SECONDS`."""


class StopSignals:
    """While entered, a signal of `SIGNALS` raises `Preempted` at once; while `deferring`, it is kept in `received`.

    `received` is the number of the last one, or 0. Further ones only set it again, so that none cuts a save short. On
    leaving, the handlers from before are put back.
    """

    def __init__(self) -> None:
        self.received = 0
        self.deferring = False

    def __enter__(self) -> StopSignals:
        in_main = threading.current_thread() is threading.main_thread()  # Python handles signals nowhere else
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS if in_main}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self.deferring:
            outlive_launcher()
        else:
            raise Preempted(f"Stopped by {signal.Signals(number).name} before the first step; nothing was saved.")
