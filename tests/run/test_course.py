"""How many steps a run has, and after which it is saved. What a run says of them is in tests/test_finetune.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from accessory.checkpoint.training_state import Progress
from accessory.run.course import Schedule


@pytest.mark.parametrize(
    ("progress", "total"),
    [(Progress(), 15), (Progress(1, 2, 7), 15), (Progress(1, 2, 9), 17), (Progress(3, 0, 15), 15)],
)
def test_steps_of_the_whole_run(progress: Progress, total: int) -> None:
    """Those that were taken, however many they were, and those that are left; over by epochs or by steps."""
    assert Schedule(3, 5, 0.0, 1e-3, 1e-3, -1.0, 1, 1).total_steps(progress) == total
    assert Schedule(3, 5, 0.0, 1e-3, 1e-3, -1.0, 1, 1).is_over(progress) == (progress.epoch == 3)
    for most in (9, 99):
        schedule = Schedule(3, 5, 0.0, 1e-3, 1e-3, -1.0, 1, 1, max_steps=most)
        assert schedule.total_steps(progress) == min(most, total)
        assert schedule.is_over(progress) == (progress.epoch == 3 or progress.total_steps >= most)
    assert schedule.is_over(replace(progress, total_steps=99, skipped=9))  # steps that changed nothing count


def test_saves_after_epochs_and_steps() -> None:
    """Every second epoch, every third step of one."""
    schedule = Schedule(9, 5, 0.0, 1e-3, 1e-3, -1.0, 2, 3)
    assert [schedule.saves_after(Progress(epoch, 0)) for epoch in (1, 2, 3, 4)] == [False, True, False, True]
    assert [schedule.saves_after(Progress(1, step)) for step in (1, 2, 3, 4)] == [False, False, True, False]
