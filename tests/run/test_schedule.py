"""How many steps a run has, how fast it learns in each, when it is saved. What is said: tests/test_finetuning.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from accessory.checkpoint.training_state import Progress
from accessory.run.schedule import Schedule


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


def rate(epoch: float, **changes: float) -> float:
    """The learning rate of 10 epochs, 2 of them warm-up, from 1e-3 down to 1e-4."""
    return replace(Schedule(10, 5, 2.0, 1e-3, 1e-4, -1.0, 1, 1), **changes).learning_rate(epoch)


def test_schedule_follows_the_formula() -> None:
    """Linear, then half a cosine; checked at every hundredth of an epoch."""
    for i in range(1001):
        epoch = i / 100
        expected = 1e-3 * epoch / 2 if epoch < 2 else 1e-4 + 9e-4 * (1 + math.cos(math.pi * (epoch - 2) / 8)) / 2
        assert rate(epoch) == pytest.approx(expected, rel=1e-12)


def test_schedule_at_its_edges() -> None:
    """Starts at 0, is highest where warm-up ends, lowest at the end and beyond."""
    assert rate(0) == 0
    assert rate(2) == 1e-3
    assert rate(6) == pytest.approx(5.5e-4)
    assert rate(10) == rate(11) == pytest.approx(1e-4)
    assert rate(0, warmup_epochs=0.0) == 1e-3
    assert rate(0.01, warmup_epochs=0.01) == 1e-3
    assert rate(0.875, warmup_epochs=0.75, epochs=1) == pytest.approx(5.5e-4)
    assert rate(1, warmup_epochs=0.75, epochs=1) == pytest.approx(1e-4)


@pytest.mark.parametrize("warmup", [10.0, 20.0])
def test_warmup_as_long_as_training(warmup: float) -> None:
    """It only ever rises."""
    rates = [rate(epoch, warmup_epochs=warmup) for epoch in range(11)]
    assert rates == [pytest.approx(1e-3 * epoch / warmup) for epoch in range(11)]


def test_constant_schedule() -> None:
    """The same warm-up, then the highest rate to the end."""
    assert rate(1, lr_schedule="constant") == rate(1) == 5e-4
    assert {rate(2 + i / 7, lr_schedule="constant") for i in range(60)} == {1e-3}


def test_constant_rate() -> None:
    """min_lr equal to lr, no warm-up."""
    assert {rate(epoch / 7, warmup_epochs=0.0, min_lr=1e-3) for epoch in range(80)} == {1e-3}


@pytest.mark.parametrize(("how", "steps"), [
    ({}, [0, 5, 10, 15]),
    ({"eval_epochs": 0.5}, [0, 3, 5, 8, 10, 13, 15]),
    ({"eval_epochs": 2.0}, [0, 10]),
    ({"eval_epochs": 1.5}, [0, 8, 15]),
    ({"eval_epochs": 0.01}, [*range(16)]),
    ({"eval_steps": 4}, [0, 4, 8, 12]),
])  # fmt: skip
def test_evaluates_whenever_a_multiple_is_reached(how: dict, steps: list[int]) -> None:
    schedule = Schedule(3, 5, 0.0, 1e-3, 1e-3, -1.0, 1, 1, **how)
    made = [Progress(total // 5, total % 5, total) for total in range(16)]
    assert [progress.total_steps for progress in made if schedule.evaluates_after(progress)] == steps
