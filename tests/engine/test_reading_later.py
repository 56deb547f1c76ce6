"""A step's numbers read behind the gradients of the next one, as on a GPU: the same steps, and none after a fault."""

from __future__ import annotations

import math

import pytest
import torch

from accessory.checkpoint.training_state import Progress
from accessory.data.batch import PackedBatch
from accessory.data.order import GlobalOrder
from accessory.engine import MOST_SKIPPED, Engine, StepSettings
from accessory.errors import NotFiniteError
from accessory.optim import build_optimizer
from accessory.run.report import StepReport
from accessory.run.schedule import Schedule


def read_later(engine: Engine) -> Engine:
    """The engine, as it runs on a GPU."""
    vars(engine)["reads_later"] = True
    return engine


def watch(engine: Engine) -> list[str]:
    """What it does from now on: forwards, the optimizer's steps, reports."""
    seen: list[str] = []
    engine.model.register_forward_pre_hook(lambda *_: seen.append("forward"))
    engine.optimizer.register_step_pre_hook(lambda *_: seen.append("update"))
    report = engine.reporter.step
    engine.reporter.step = lambda made: (seen.append(f"report {made.step}"), report(made))
    return seen


def test_numbers_are_read_behind_the_next_gradients(engine: Engine) -> None:
    """But at once where the run ends or is saved."""
    engine.order = GlobalOrder(engine.order.corpus, batch_size=6, accum_iter=1)
    engine.schedule, engine.saver = Schedule(4, 1, 0.0, 1e-3, 1e-3, -1.0, 9, 9), None
    seen = watch(read_later(engine))
    engine.train(Progress())
    step = ["forward", "update"]
    assert seen == [*step, "forward", "report 1", "update", "forward", "report 2", "update", "forward", "report 3",
                    "update", "report 4"]  # fmt: skip


@pytest.mark.parametrize("clip_grad", [-1.0, 0.05])
def test_reading_behind_changes_no_step(engine: Engine, clip_grad: float) -> None:
    """Not a digit without clipping; with it, gradients are divided in the optimizer instead of multiplied before."""
    engine.schedule, engine.saver = Schedule(2, 2, 0.0, 1e-3, 1e-3, clip_grad, 9, 9), None
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    found, parameters = [], list(engine.parameters.values())
    for later in (False, True):
        for name, value in before.items():
            engine.parameters[name].data.copy_(value)
        engine.optimizer = build_optimizer("adamw", dict(engine.parameters), 1e-3, 0.1)
        vars(engine)["reads_later"] = later
        reports: list[StepReport] = []
        engine.reporter.step = reports.append
        engine.train(Progress())
        found.append([[(r.step, r.epoch, r.loss, r.grad_norm, r.lr, r.accuracy, r.tokens) for r in reports],
                      torch.cat([p.detach().flatten() for p in parameters])])  # fmt: skip
    if clip_grad < 0:
        assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    else:
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-7)


def test_device_skips_a_step_that_is_not_finite(engine: Engine) -> None:
    """Parameters and moments stay; the host learns of it one step later, in that step's name."""
    engine.settings, engine.saver = StepSettings(skip_not_finite=True), None
    engine.schedule = Schedule(3, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9)
    said, reports, states = [], [], []
    engine.reporter.say, engine.reporter.step = said.append, reports.append
    forward = engine._forward

    def poisoned(batch: PackedBatch, counts: torch.Tensor) -> torch.Tensor:
        """The second step's losses are infinite."""
        return forward(batch, counts) * (math.inf if len(states) == 1 else 1.0)

    engine._forward = poisoned
    state = engine.optimizer.state
    engine.optimizer.register_step_post_hook(
        lambda *_: states.append(
            torch.cat([t.detach().flatten().clone() for p in engine.parameters.values()
                       for t in (p, state[p]["exp_avg"], state[p]["exp_avg_sq"], state[p]["step"])])
        )
    )  # fmt: skip
    progress = Progress()
    read_later(engine).train(progress)
    assert torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])
    assert len(reports) == 6 and [math.isfinite(report.loss) for report in reports] == [True, False] + [True] * 4
    assert said[0].startswith("Step 2: the loss is inf") and "1 of the run's 6 steps were skipped" in said[-1]


def test_a_step_that_is_not_finite_ends_the_run_before_the_next_update(engine: Engine) -> None:
    engine.model.llma.norm.weight.data[0] = math.nan
    seen, engine.saver = watch(read_later(engine)), None
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9)
    before = torch.cat([p.detach().flatten() for p in engine.parameters.values()])
    with pytest.raises(NotFiniteError, match="Step 1: the loss is nan"):
        engine.train(Progress())
    after = torch.cat([p.detach().flatten() for p in engine.parameters.values()])
    assert seen.count("update") == 1
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def test_as_many_skipped_steps_in_a_row_as_without(engine: Engine) -> None:
    """A run in which nothing is ever finite ends, though each step is known to be skipped one step late."""
    engine.model.llma.norm.weight.data[0] = math.nan
    engine.settings, engine.saver = StepSettings(skip_not_finite=True), None
    engine.schedule = Schedule(MOST_SKIPPED, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 99)
    progress = Progress()
    with pytest.raises(NotFiniteError, match=f"Step {MOST_SKIPPED + 1}: .* {MOST_SKIPPED} steps before it were"):
        read_later(engine).train(progress)
