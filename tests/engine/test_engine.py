"""The loop: what a step computes, when it saves, and how it stops. Layouts and resuming are in test_finetuning.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accessory.checkpoint.training_state import Progress
from accessory.checkpoint.validation_state import ValidationState
from accessory.data.batch import PackedBatch
from accessory.data.order import GlobalOrder
from accessory.engine import MOST_SKIPPED, Engine, StepSettings
from accessory.errors import NotFiniteError, OutOfMemoryError, Preempted
from accessory.run.report import StepReport
from accessory.run.schedule import Schedule
from accessory.run.signals import StopSignals
from accessory.run.validation import Validation


def test_loss_is_the_mean_over_supervised_tokens_of_the_global_batch(engine: Engine) -> None:
    """Not the mean of micro-batch means: the documents have very different lengths."""
    total = count = 0
    for i in engine.order.global_ids(0, 0):
        tokens, labels = (torch.from_numpy(a.astype("int64")) for a in engine.order.corpus.document(i))
        logits = engine.model.logits(tokens, (len(tokens),))
        total += F.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum").item()
        count += int((labels >= 0).sum())
    report, _ = engine.step(Progress())
    assert report.supervised == count
    assert report.loss == pytest.approx(total / count, rel=1e-6)
    assert report.accuracy < 0.5
    engine.model.llma.output.weight.data.zero_()  # all tokens are equally likely: none is likelier than the right one
    assert engine.step(Progress())[0].accuracy == 1


def test_prompts_that_weigh_something(engine: Engine) -> None:
    """The loss is the sum of weighted losses over the sum of weights, beginnings being shared; accuracy is answers'."""
    corpus, head = engine.order.corpus, engine.model.llma.output.weight
    head.data[1:] = 0  # a label is the likeliest, along with others, where the logit of token 0 is not above 0
    engine.order = GlobalOrder(corpus, batch_size=3, accum_iter=2, prompt_weight=0.25)
    assert any(any(batch.shared) for batch in engine.order.micro_batches(0, 0))
    total = count = 0.0
    right: dict[bool, list[bool]] = {True: [], False: []}  # of answers and of prompts
    for i in engine.order.global_ids(0, 0):
        tokens, labels = (torch.from_numpy(a.astype("int64")) for a in corpus.document(i))
        logits = engine.model.logits(tokens, (len(tokens),)).double()
        hits = logits[:-1].gather(1, tokens[1:, None])[:, 0] == logits[:-1].amax(1)
        for learned, hit in zip((labels[:-1] >= 0).tolist(), hits.tolist(), strict=True):
            right[learned].append(hit)
        weights = torch.where(labels[:-1] >= 0, 1.0, 0.25).double()
        total += (F.cross_entropy(logits[:-1], tokens[1:], reduction="none") @ weights).item()
        count += float(weights.sum())
    report, _ = engine.step(Progress())
    assert report.loss == pytest.approx(total / count, rel=1e-6)
    assert report.supervised == int(corpus.supervised[engine.order.global_ids(0, 0)].sum()) == len(right[True])
    answers, prompts = (sum(right[learned]) / len(right[learned]) for learned in (True, False))
    assert report.accuracy == pytest.approx(answers, rel=1e-6) and abs(answers - prompts) > 1e-5


def test_what_a_step_reports(engine: Engine) -> None:
    """Of the whole global batch, at the end of the step; the norm is that of the documents one by one."""
    engine.schedule = Schedule(2, 2, 1.0, 1e-3, 1e-4, -1.0, 1, 1)
    for i in engine.order.global_ids(0, 1):
        engine.model(PackedBatch.pack([(*engine.order.corpus.document(i), i)])).backward()
    gradients = torch.cat([p.grad.flatten() for p in engine.parameters.values()])
    supervised = engine.order.supervised_tokens(0, 1)
    engine.optimizer.zero_grad()
    progress = Progress(step=1, total_steps=1)
    report, asked = engine.step(progress)
    assert (report.step, report.epoch, report.lr, asked) == (2, 1.0, 1e-3, (0, 0, 0))
    assert (report.tokens, report.supervised) == (engine.order.tokens(0, 1), supervised)
    assert report.grad_norm == pytest.approx(gradients.norm().item() / supervised, rel=1e-4)
    assert 0 < report.seconds < 60 and 2**20 < report.peak_bytes < 2**40
    assert progress == Progress(epoch=1, total_steps=2)
    assert all(p.grad is None for p in engine.parameters.values())


def test_gradient_does_not_depend_on_accumulation(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = []
    for batch_size, accum_iter in ((6, 1), (3, 2), (1, 6)):
        engine.order = GlobalOrder(engine.order.corpus, batch_size=batch_size, accum_iter=accum_iter)
        engine.schedule = Schedule(2, 2, 0.0, 1e-12, 1e-12, -1.0, 1, 1)
        norms.append(engine.step(Progress())[0].grad_norm)
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-5)


def test_nor_on_micro_batches_by_tokens(engine: Engine) -> None:
    """As many documents a step, cut as `max_tokens` says: the same loss and gradient, to rounding."""
    corpus, found, counts = engine.order.corpus, [], []
    longest, total = int(corpus.lengths.max()), int(corpus.lengths.sum())
    for most in (None, longest, longest + 40, total):
        engine.order = GlobalOrder(corpus, batch_size=3, accum_iter=2, max_tokens=most)
        engine.schedule = Schedule(2, 2, 0.0, 1e-12, 1e-12, -1.0, 1, 1)
        counts.append(len(list(engine.order.micro_batches(0, 0))))
        report, _ = engine.step(Progress())
        found.append((report.loss, report.grad_norm, report.tokens, report.supervised))
    assert counts[-1] == 1 and counts[1] > 2
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-5)


def test_clipping_bounds_the_update(engine: Engine) -> None:
    seen = []
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, 0.1, 1, 1)
    engine.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in engine.parameters.values()]).norm().item())
    )
    report, _ = engine.step(Progress())
    assert report.grad_norm > 0.1
    assert seen == pytest.approx([0.1], rel=1e-3)


@pytest.mark.parametrize("clip_grad", [0.0, -1.0, 1e3])
def test_a_gradient_within_bounds_is_left_as_it_is(engine: Engine, clip_grad: float) -> None:
    """Nor is there a bound where `clip_grad` is 0 or less."""
    seen = []
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, clip_grad, 1, 1)
    engine.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.cat([p.grad.flatten() for p in engine.parameters.values()]).norm().item())
    )
    report, _ = engine.step(Progress())
    assert seen == pytest.approx([report.grad_norm], rel=1e-6)


def test_saves_each_epoch_and_in_between(engine: Engine) -> None:
    engine.train(Progress())
    saved = [made[:2] for made in engine.saver.made]
    assert saved == [("epoch0-iter1", 1), ("epoch0", 2), ("epoch1-iter1", 3), ("epoch1", 4)]


def test_steps_and_evaluations_are_watched_over(engine: Engine, watched: list[str]) -> None:
    """A rank that hangs in them is noticed; each micro-batch is progress."""
    engine.train(Progress())
    assert watched[:6] == ["in", "tick", "tick", "out", "in", "out"]  # a step, and its save
    assert watched.count("in") == watched.count("out") == 8
    watched.clear()
    state, device = ValidationState("of these documents"), torch.device("cpu")
    parts = engine.model, engine.order, ["data.json"], engine.schedule, state, engine.reporter, engine.signals, device
    Validation(*parts).after(Progress(), last=True)
    assert watched == ["in", "tick", "tick", "out"]


def test_a_run_cut_by_max_steps_is_saved_once(engine: Engine) -> None:
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 1, 100, max_steps=3)
    engine.train(Progress())
    assert [name for name, *_ in engine.saver.made] == ["epoch0", "epoch1-iter1"]


def test_stops_before_the_optimizer_when_not_finite(engine: Engine) -> None:
    engine.model.llma.norm.weight.data[0] = math.nan
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    with pytest.raises(
        NotFiniteError, match=r"Step 1: the loss is nan.*no finite loss: \d \([^ ]*data.json:1 record \d\), \d \("
    ):
        engine.step(Progress())
    for name, value in before.items():
        torch.testing.assert_close(engine.parameters[name].data, value, equal_nan=True, rtol=0, atol=0)


def test_fp16_scales_the_loss_from_the_first_step_on(engine: Engine) -> None:
    """What the backward pass starts from, as autograd sees it: 65,536 over the supervised tokens, or what was saved."""
    engine.settings, seen = StepSettings(scales_loss=True), []

    def watch(model: nn.Module, inputs: tuple, loss: torch.Tensor) -> None:
        loss.register_hook(lambda gradient: seen.append(gradient.item()))

    engine.model.register_forward_hook(watch)
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9, max_steps=1)
    engine.train(Progress())
    assert seen == pytest.approx([65536 / engine.order.supervised_tokens(0, 0)] * 2, rel=1e-6)
    seen.clear()
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9, max_steps=2)
    progress = Progress(step=1, total_steps=1, loss_scale=512.0, good_steps=1999)
    engine.train(progress)
    assert seen == pytest.approx([512 / engine.order.supervised_tokens(0, 1)], rel=1e-6)
    assert (progress.loss_scale, progress.good_steps) == (1024, 2000)
    seen.clear()
    engine.settings = StepSettings()
    engine.step(Progress(step=1, total_steps=1))
    assert seen == pytest.approx([1 / engine.order.supervised_tokens(0, 1)], rel=1e-6)


def test_the_scale_changes_no_step(engine: Engine) -> None:
    """By a power of two, in fp32: the norm that is reported and what the optimizer is given, bit for bit."""
    given, reports = [], []
    engine.optimizer.register_step_pre_hook(
        lambda *_: given.append(torch.cat([p.grad.flatten() for p in engine.parameters.values()]))
    )
    engine.schedule = Schedule(2, 2, 0.0, 1e-12, 1e-12, 0.1, 9, 9)
    before = {name: p.detach().clone() for name, p in engine.parameters.items()}
    for scaled in (False, True):
        engine.settings = StepSettings(scales_loss=scaled)
        for name, value in before.items():
            engine.parameters[name].data.copy_(value)
        reports.append(engine.step(Progress())[0])
    assert torch.equal(*given) and reports[0].grad_norm == reports[1].grad_norm


def test_fp16_skips_the_step_and_halves_the_scale(engine: Engine) -> None:
    """And says so, with the documents."""
    engine.settings, said = StepSettings(scales_loss=True), []
    engine.reporter.say = said.append
    before = engine.model.llma.norm.weight.detach().clone()
    progress = Progress(loss_scale=1e38, good_steps=7)  # overflows any gradient
    engine.step(progress)
    assert torch.equal(engine.model.llma.norm.weight, before) and not engine.optimizer.state
    assert progress == Progress(step=1, total_steps=1, loss_scale=5e37, good_steps=0, skipped=1)
    (line,) = said
    assert line.startswith("Step 1: the loss is ") and "at a loss scale of 1e+38. Every micro-batch has a fin" in line
    assert line.count("data.json:1 record ") == 6 and line.endswith("by it, and the loss scale halved.")


def test_a_loss_scale_at_its_floor_ends_the_run(engine: Engine) -> None:
    engine.settings = StepSettings(scales_loss=True)
    engine.model.llma.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    progress = Progress(loss_scale=2.0)
    engine.step(progress)
    with pytest.raises(NotFiniteError, match=r"Step 2: .* at a loss scale of 1\. .* give --precision bf16 or fp32"):
        engine.step(progress)
    assert not engine.optimizer.state


def test_a_run_that_only_skipped_is_not_finished(engine: Engine) -> None:
    """Nor is what it did not learn saved at its end."""
    engine.settings = StepSettings(skip_not_finite=True)
    engine.model.llma.norm.weight.data[0] = math.nan
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9)
    with pytest.raises(NotFiniteError, match="All 4 steps of the run were skipped: nothing was learned"):
        engine.train(Progress())
    assert not engine.saver.made


@pytest.mark.parametrize(("broken", "said"), [((), []), ((1,), ["1 of the run's 4 steps were skipped."]),
    ((1, 2, 3), ["3 of the run's 4 steps were skipped, the last 3 among them."]),
])  # fmt: skip
def test_skipped_steps_are_counted_at_the_end(engine: Engine, broken: tuple[int, ...], said: list[str]) -> None:
    """Those that an earlier run skipped before this one went on from it, too."""
    lines: list[str] = []
    engine.settings, engine.reporter.say, progress = StepSettings(skip_not_finite=True), lines.append, Progress()
    engine.model.llma.norm.weight.register_hook(
        lambda gradient: gradient * (math.inf if progress.total_steps in broken else 1.0)
    )
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9, max_steps=3)
    engine.train(progress)
    engine.schedule, lines[:] = replace(engine.schedule, max_steps=4), []
    engine.train(progress)
    assert [line for line in lines if not line.startswith("Step ")] == said


def test_skipped_steps_may_not_count(engine: Engine) -> None:
    """For a run that is to take one true step: the first one whose gradient is finite is its last."""
    engine.settings = StepSettings(scales_loss=True)
    engine.schedule = Schedule(9, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9, max_steps=1, skipped_count=False)
    progress = Progress(loss_scale=2.0**70)
    engine.train(progress)
    assert progress.skipped == 0 and progress.good_steps == 1 and progress.total_steps > 1


def test_saves_when_minutes_have_passed(engine: Engine) -> None:
    """Counted from the last save, whatever it was made for."""
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9, save_every_minutes=1e-9)
    engine.train(Progress())
    assert [name for name, *_ in engine.saver.made] == ["epoch0-iter1", "epoch0", "epoch1-iter1", "epoch1"]
    engine.saver.made.clear()
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9, save_every_minutes=60)
    engine.train(Progress())
    assert [name for name, *_ in engine.saver.made] == ["epoch1"]


def test_what_is_saved_has_the_mean_loss_since_the_last_save(engine: Engine) -> None:
    losses = []
    engine.reporter.step = lambda report: losses.append(report.loss)
    engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 1, 9)
    engine.train(Progress())
    saved = [loss for *_, loss in engine.saver.made]
    assert saved == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2], rel=1e-12)


def test_a_signal_saves_the_step_and_ends_the_run(engine: Engine) -> None:
    """Unless it was the last one anyway."""
    for at, steps in ((2, 4), (4, 4)):
        engine.saver, engine.signals = type(engine.saver)(), StopSignals()
        engine.schedule = Schedule(2, 2, 0.0, 1e-3, 1e-3, -1.0, 9, 9)
        signals = engine.signals

        def note(report: StepReport, at: int = at - 1, signals: StopSignals = signals) -> None:
            signals.received = 15 if report.step == at else signals.received

        engine.reporter.step = note
        if at < steps:
            with pytest.raises(
                Preempted, match=r"Stopped by SIGTERM after step 2, which is saved as epoch0\."
            ) as caught:
                engine.train(Progress())
            assert caught.value.common
        else:
            engine.train(Progress())
        assert [steps for _, steps, _ in engine.saver.made] == [at]


def test_a_run_that_writes_nothing_does_not_say_that_it_saved(engine: Engine) -> None:
    engine.saver, engine.signals.received = None, 15
    with pytest.raises(Preempted, match=r"Stopped by SIGTERM after step 1\. Nothing is saved"):
        engine.train(Progress())


def test_a_save_after_skipped_steps_alone_has_no_loss(engine: Engine) -> None:
    engine.settings = StepSettings(skip_not_finite=True)
    engine.model.llma.norm.weight.data[0] = math.nan
    with pytest.raises(NotFiniteError, match="All 4 steps of the run were skipped"):
        engine.train(Progress())
    assert [loss for *_, loss in engine.saver.made] == [None, None, None]


def test_a_first_step_that_is_not_finite_had_none_before_it(engine: Engine) -> None:
    engine.model.llma.norm.weight.data[0] = math.nan
    with pytest.raises(NotFiniteError, match=r"more\. Look at the documents|\)\. Look at the documents"):
        engine.step(Progress())


def test_steps_are_skipped_only_so_often(engine: Engine) -> None:
    """`MOST_SKIPPED` in a row; one more ends the run."""
    engine.settings = StepSettings(skip_not_finite=True)
    engine.schedule = Schedule(9, 2, 0.0, 1e-3, 1e-3, -1.0, 99, 99)
    engine.model.llma.norm.weight.data[0] = math.nan
    with pytest.raises(NotFiniteError, match=rf"Step {MOST_SKIPPED + 1}: .* {MOST_SKIPPED} steps before it were"):
        engine.train(Progress())
    assert not engine.optimizer.state


def test_documents_of_a_step_that_is_skipped_are_named(engine: Engine) -> None:
    """Eight at most, and those of the micro-batches without a finite loss, where there are any."""
    said: list[str] = []
    engine.settings, engine.reporter.say = StepSettings(skip_not_finite=True), said.append
    progress = Progress(total_steps=4)
    engine.order = GlobalOrder(engine.order.corpus, batch_size=2, accum_iter=2, shuffle=False)
    broken = engine.model.register_forward_hook(
        lambda model, given, loss: loss * (1 if 0 in given[0].sample_ids else math.nan)
    )
    engine.step(progress)
    assert said.pop() == (
        "Step 5: the loss is nan, the gradient norm nan. Documents whose micro-batch has no finite loss: "
        f"{', '.join(map(engine.order.corpus.where, (2, 3)))}. The step is skipped: nothing is changed by it."
    )
    broken.remove()
    engine.model.llma.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    engine.step(progress)
    line = said.pop()
    assert line.startswith("Step 6: the loss is ") and ", the gradient norm nan. Every micro-batch has a finite" in line
    assert all(f" {engine.order.corpus.where(i)}" in line for i in (4, 5, 6, 7)) and "more" not in line
    engine.order = GlobalOrder(engine.order.corpus, batch_size=8, accum_iter=1)
    engine.step(replace(progress, step=0))
    line = said.pop()
    assert line.count("data.json:1 record ") == 8 and "more" not in line
    engine.order.documents = lambda epoch, step: torch.arange(11).numpy()
    engine.order.where = str
    engine.settings = StepSettings()
    with pytest.raises(NotFiniteError) as caught:
        engine.step(progress)
    said = str(caught.value)
    assert (
        said.startswith("Step 7: ")
        and " and 3 more. 2 steps before it were skipped. Look at the documents, low" in said
    )
    assert caught.value.common  # one rank says it for all


def test_memory_that_runs_out_is_said_with_the_micro_batch(engine: Engine) -> None:
    """Its number, its documents, and what would help; other errors are not touched."""
    engine.settings = StepSettings(memory_remedies="--batch_size 1")
    full = [None, torch.OutOfMemoryError("of 8 GB"), None, RuntimeError("a shape")]

    def fail(*_: object) -> None:
        if error := full.pop(0):
            raise error

    engine.model.register_forward_pre_hook(fail)
    second = list(engine.order.micro_batches(0, 0))[1]
    with pytest.raises(OutOfMemoryError) as caught:
        engine.step(Progress(total_steps=6))
    assert str(caught.value) == (
        f"Step 7: out of memory in micro-batch 2 of 2, which has {sum(second.lengths):,} tokens in documents of "
        f"{', '.join(map(str, second.lengths))}. What is saved is whole. Less memory is needed with --batch_size 1."
    )
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(RuntimeError, match=r"^a shape$"):
        engine.step(Progress())


@pytest.mark.parametrize("where", ["optimizer.step", "parameters.sum_partial_gradients"])
def test_memory_that_runs_out_in_the_update_is_said(engine: Engine, monkeypatch, where: str) -> None:
    """Moments are made in the first one; cuBLAS and NCCL have errors of their own."""
    owner, name = where.split(".")
    monkeypatch.setattr(getattr(engine, owner), name, raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")))
    engine.settings = StepSettings(memory_remedies="--optim adamw8bit")
    with pytest.raises(OutOfMemoryError, match=r"^Step 1: out of memory in the update of the weights.*--optim"):
        engine.step(Progress())
    monkeypatch.setattr(getattr(engine, owner), name, raising(RuntimeError("a shape")))
    with pytest.raises(RuntimeError, match="a shape"):
        engine.step(Progress())


def raising(error: Exception) -> Callable:
    """What raises it, whatever it is given."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail
