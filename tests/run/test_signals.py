"""Signals stop a run at once before it trains, and are kept while it does."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from accessory.errors import Preempted
from accessory.run.signals import SIGNALS, StopSignals


@pytest.mark.parametrize("number", SIGNALS)
def test_before_the_first_step(number: int) -> None:
    before = signal.getsignal(number)
    said = f"Stopped by {signal.Signals(number).name} before the first step"
    with pytest.raises(Preempted, match=said), StopSignals():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_while_training() -> None:
    """However many come."""
    with StopSignals() as signals:
        signals.deferring = True
        assert signals.received == 0
        for number in (*SIGNALS, *SIGNALS):
            os.kill(os.getpid(), number)
            assert signals.received == number


def test_in_a_thread_signals_are_left_alone() -> None:
    before, failed = signal.getsignal(signal.SIGTERM), []

    def enter() -> None:
        with StopSignals():
            failed.append(signal.getsignal(signal.SIGTERM) is not before)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert failed == [False]
