"""The one training loop: batches -> loss -> step -> log -> save. It knows no family, method or format by name."""

from __future__ import annotations

import math
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from accessory.checkpoint.training_state import FIRST_LOSS_SCALE, LEAST_LOSS_SCALE, Progress
from accessory.data.batch import PackedBatch
from accessory.data.order import Order
from accessory.memory.base_cache import BaseCache
from accessory.memory.exhausted import out_of_memory_as
from accessory.optim import can_be_guarded, guarded_step
from accessory.parallel.agree import highest
from accessory.parallel.data import reduce_gradients, reshard, sum_over_data_parallel
from accessory.parallel.groups import supervised, tick
from accessory.parallel.later import Later
from accessory.parallel.parameters import NamedParameters
from accessory.run import step_faults
from accessory.run.integer_moves import IntegerMoves
from accessory.run.report import Distillation, Reporter, StepReport, peak_memory
from accessory.run.saving import Saver
from accessory.run.schedule import Schedule
from accessory.run.signals import StopSignals
from accessory.run.validation import Outcome, Validation

MOST_SKIPPED = int(math.log2(FIRST_LOSS_SCALE / LEAST_LOSS_SCALE))
"""Steps in a row that may be skipped: as many as it takes to bring fp16's loss scale down to its floor."""
_OVERFLOWS = 1  # only the gradient, in fp16: a smaller loss scale may mend it
_NOT_FINITE = 2


class Asked(NamedTuple):
    """What at least one rank asks all ranks for: to skip the step (and why), to save, to stop (which signal it got)."""

    not_finite: int
    save: int
    stop: int


@dataclass(frozen=True)
class StepSettings:
    """How a step is computed, and what happens if it fails."""

    scales_loss: bool = False
    """Whether the loss is multiplied by `Progress.loss_scale` before the backward, which fp16 needs."""
    pin_memory: bool = False
    """Whether a micro-batch goes to a GPU from pinned memory, beside the work there."""
    skip_not_finite: bool = False
    """Whether a step whose loss or gradient is not finite changes nothing, instead of ending the run."""
    memory_remedies: str = ""
    """Flags that make a step smaller, named in the error if memory runs out."""
    teacher_weight: float | None = None
    """A teacher's share of the loss, the rest being cross-entropy; None: there is no teacher."""


@dataclass
class _Step:
    """A step whose gradients have been asked for; a GPU may still be computing them.

    at: the progress before it. weight: the divisor of the sum of losses. scale: the loss scale that gradients contain.
    losses: of each micro-batch, fp64 []. loss fp64 [] and norm []: of the whole step, on the device. numbers: loss,
    norm, the number of tokens predicted rightly, and the sum of cross-entropies if there is a teacher.
    """

    at: Progress
    began: float
    weight: float
    scale: float
    epoch: float
    losses: list[Tensor]
    loss: Tensor
    norm: Tensor
    numbers: Later
    updated: bool = False
    """Whether the optimizer has stepped."""


@dataclass
class Engine:
    """Trains `model`, whose trained parameters are `parameters`. saver: None for a run that writes nothing.

    base_cache: what the model takes its base's states from, if anything. validation: evaluates it now and then, if
    that is wanted. moves: changes whole numbers of the base between steps, if the method trains these.
    """

    model: nn.Module
    parameters: NamedParameters
    optimizer: torch.optim.Optimizer
    order: Order
    schedule: Schedule
    settings: StepSettings
    reporter: Reporter
    saver: Saver | None
    signals: StopSignals
    base_cache: BaseCache | None = None
    validation: Validation | None = None
    moves: IntegerMoves | None = None
    _waiting: _Step | None = None  # the previous step, while its numbers are not read yet
    _ended: float = 0.0  # when the last report was made

    def train(self, progress: Progress) -> None:
        """Run from `progress` to the end of the schedule, saving on the way and at the end.

        Raises, on all ranks after the same step: `Preempted` once it is saved, where one of them was asked to stop;
        `NotFiniteError`. On the one rank it happens to: `OutOfMemoryError`.
        """
        self.model.train()
        schedule, saved_at = self.schedule, progress.total_steps
        self._catch_up(progress)
        while not self._is_over(progress):
            with supervised():
                asked = self._go_on(progress)
            if asked is None:
                continue
            last = schedule.is_over(progress)
            if last and progress.skipped == progress.total_steps:
                raise step_faults.nothing_learned(progress, self.settings.scales_loss)
            outcome = self._evaluate(progress, last) if not asked.stop else Outcome()
            stop = asked.stop or outcome.stop
            wanted = stop or asked.save or schedule.saves_after(progress)
            if wanted or outcome.best:
                self._save(progress, only_best=not (wanted or last))
                saved_at = progress.total_steps
            elif progress.step == 0:
                self._settle()
            if stop and not last:
                raise step_faults.preempted(stop, progress, saved=self.saver is not None)
        if saved_at != progress.total_steps:
            self._save(progress)
        if skipped := progress.total_steps - max((int(s["step"]) for s in self.optimizer.state.values()), default=0):
            last = f", the last {progress.skipped} among them" if progress.skipped else ""
            self.reporter.say(f"{skipped} of the run's {progress.total_steps} steps were skipped{last}.")
        if self.validation and (words := self.validation.closing_words()):
            self.reporter.say(words)

    def _go_on(self, progress: Progress) -> Asked | None:
        """Make a step and report it; returns what ranks ask for after it, or None if its numbers are not read yet."""
        step = self._begin(progress)
        earlier = self._finish_waiting(progress)
        if self.reads_later:
            step.at.skipped = progress.skipped  # known only now
            self._update_unread(step, progress)
            if not (earlier.save or earlier.stop or self._must_read(progress)):
                self._waiting = step
                if progress.step == 0:
                    self._settle()
                return None
        report, asked = self._finish(step, progress)
        self.reporter.step(report)
        return asked._replace(save=max(asked.save, earlier.save), stop=max(asked.stop, earlier.stop))

    @cached_property
    def reads_later(self) -> bool:
        """Whether a step's numbers are read after the next one's gradients are asked for, so that a GPU never idles.

        The device itself then decides by them whether the optimizer steps. fp16's loss scale and moves of integers need
        the numbers on the host before the next step, so they rule this out.
        """
        needed = self.settings.scales_loss or self.moves is not None
        return self.parameters.device.type == "cuda" and not needed and can_be_guarded(self.optimizer)

    def _must_read(self, progress: Progress) -> bool:
        """Whether a save, an evaluation or the end follows this step: they need its numbers, or need them finite."""
        evaluates = self.validation is not None and self.schedule.evaluates_after(progress)
        saves = self.saver is not None and self.schedule.saves_after(progress)
        return evaluates or saves or self.schedule.is_over(progress)

    def _finish_waiting(self, progress: Progress) -> Asked:
        """Report the previous step, if its numbers are not read yet; returns what ranks asked for after it."""
        if self._waiting is None:
            return Asked(0, 0, 0)
        step, self._waiting = self._waiting, None
        report, asked = self._finish(step, progress)
        self.reporter.step(report)
        return asked

    def _is_over(self, progress: Progress) -> bool:
        return self.schedule.is_over(progress) or (self.validation is not None and self.validation.is_over)

    def _catch_up(self, progress: Progress) -> None:
        """Evaluate before the first step, and after an earlier run that was stopped before it could."""
        outcome = self.validation.catch_up(progress) if self.validation else Outcome()
        if outcome.stop:
            raise step_faults.preempted(outcome.stop, progress, saved=progress.total_steps > 0)
        if outcome.best:
            self._save(progress)

    def _evaluate(self, progress: Progress, last: bool) -> Outcome:
        return self.validation.after(progress, last) if self.validation else Outcome()

    def _save(self, progress: Progress, only_best: bool = False) -> None:
        """Save, if this run writes anything; a run that goes on from there finds in the cache all that it had."""
        self._settle()
        if self.saver:
            self.saver(progress, only_best)

    def _settle(self) -> None:
        if self.base_cache:
            self.base_cache.settle()

    def step(self, progress: Progress) -> tuple[StepReport, Asked]:
        """One optimizer step on one global batch; moves `progress` on by it."""
        return self._finish(self._begin(progress), progress)

    def _begin(self, progress: Progress) -> _Step:
        """Compute a step's gradients."""
        began, at, scales = time.monotonic(), (progress.epoch, progress.step), self.settings.scales_loss
        weight = self.order.loss_weight(*at)
        scale = progress.loss_scale if scales else 1.0
        if self.moves:
            self.moves.begin(progress.total_steps)
        taught = self.settings.teacher_weight
        counts = torch.zeros(1 if taught is None else 2, dtype=torch.float64, device=self.parameters.device)
        with self.model.constant():
            losses = self._accumulate(progress, scale / weight, counts)
        loss = sum_over_data_parallel(torch.stack(losses).sum()) / weight
        with self._memory_for_update(progress):
            self.parameters.sum_partial_gradients()
            norm = self.parameters.gradient_norm()
        numbers = Later(torch.cat([torch.stack([loss, norm.double()]), sum_over_data_parallel(counts)]))
        epoch = progress.epoch + (progress.step + 1) / self.schedule.steps_per_epoch
        return _Step(replace(progress), began, weight, scale, epoch, losses, loss, norm, numbers)

    def _update_unread(self, step: _Step, progress: Progress) -> None:
        """Step the optimizer before the host knows the step's numbers; the device skips it if they are not finite."""
        self._set_learning_rate(self.schedule.learning_rate(step.epoch))
        bound = self.schedule.clip_grad
        with self._memory_for_update(progress):
            divisor = ((step.norm + 1e-6) / bound).clamp(min=1.0) if bound > 0 else torch.ones_like(step.norm)
            skip = (step.loss + step.norm).mul(0.0) != 0  # times 0, a NaN or infinity becomes NaN, which is not 0
            guarded_step(self.optimizer, divisor, skip)
        self.optimizer.zero_grad(set_to_none=True)
        progress.advance(self.schedule.steps_per_epoch, skipped=False)
        step.updated = True

    def _finish(self, step: _Step, progress: Progress) -> tuple[StepReport, Asked]:
        """Read the step's numbers, and step the optimizer if that was not done before.

        `progress` advances by the step. If it has advanced already, a step that turns out to be skipped corrects it.
        """
        loss, norm, hits, *entropy = step.numbers.read()
        norm, at = norm / step.scale, (step.at.epoch, step.at.step)
        asked = self._agree(loss, norm)
        if asked.not_finite:
            self._skip(asked.not_finite == _OVERFLOWS, loss, norm, step.losses, step.at)
        elif self.saver:
            self.saver.losses.append(loss)
        if not step.updated:
            self._update_read(step, loss, norm, asked.not_finite, progress)
        elif asked.not_finite:
            progress.skipped = step.at.skipped + 1
        taught = self.settings.teacher_weight
        began, self._ended = max(step.began, self._ended), time.monotonic()
        return StepReport(
            step=step.at.total_steps + 1,
            epoch=step.epoch,
            loss=loss,
            accuracy=hits / self.order.supervised_tokens(*at),
            lr=self.schedule.learning_rate(step.epoch),
            grad_norm=norm,
            tokens=self.order.tokens(*at),
            supervised=self.order.supervised_tokens(*at),
            seconds=self._ended - began,
            peak_bytes=peak_memory(self.parameters.device),
            figures=self.moves.figures() if self.moves else {},
            distillation=None if taught is None else Distillation.of(loss, entropy[0] / step.weight, taught),
        ), asked

    def _update_read(self, step: _Step, loss: float, norm: float, not_finite: int, progress: Progress) -> None:
        """Step the optimizer, unless the step is skipped."""
        scales = self.settings.scales_loss
        if not not_finite:
            with self._memory_for_update(progress):
                if self.moves:
                    again = partial(self._loss_again, progress, step.weight)
                    self.moves.move(self.optimizer, loss, step.weight, again)
                clipped = self._update(norm, self.schedule.learning_rate(step.epoch), step.scale)
            if self.moves:
                self.moves.clipped_by(clipped)
        self.optimizer.zero_grad(set_to_none=True)
        if self.moves:
            self.moves.end(self.optimizer, progress.total_steps, skipped=bool(not_finite))
        if scales and not_finite != _NOT_FINITE:
            progress.rescale(finite=not not_finite)
        progress.advance(self.schedule.steps_per_epoch, skipped=bool(not_finite))

    def _accumulate(self, progress: Progress, factor: float, counts: Tensor) -> list[Tensor]:
        """Accumulate gradients of `factor` times the summed loss; returns each micro-batch's sum of losses, fp64 [].

        counts: fp64 [1], to which the number of rightly predicted tokens of answers is added; with a teacher [2], the
        other being the sum of cross-entropies.
        """
        pending = list(self.order.micro_batches(progress.epoch, progress.step))
        if self.base_cache:
            self.base_cache.expect(self.order.documents(*self._after(progress)))
        losses = []
        for i, batch in enumerate(pending):
            reduce_gradients(self.model, last=i == len(pending) - 1)
            said = partial(step_faults.out_of_memory, i, len(pending), batch, progress, self.settings.memory_remedies)
            tick()
            with out_of_memory_as(said):
                loss = self._forward(batch, counts)
                (loss * factor).backward()
            losses.append(loss.detach().double())
        return losses

    def _memory_for_update(self, progress: Progress) -> AbstractContextManager[None]:
        """A context whose out-of-memory errors say that the update, not a micro-batch, ran out."""
        return out_of_memory_as(partial(step_faults.out_of_memory_in_update, progress, self.settings.memory_remedies))

    @torch.no_grad()
    def _loss_again(self, progress: Progress, weight: float) -> float:
        """The loss of the same step's documents with the weights as they are now."""
        counts = torch.zeros(1, dtype=torch.float64, device=self.parameters.device)
        batches = self.order.micro_batches(progress.epoch, progress.step)
        losses = [self._forward(batch, counts).double() for batch in batches]
        reshard(self.model)
        return (sum_over_data_parallel(torch.stack(losses).sum()) / weight).item()

    def _after(self, progress: Progress) -> tuple[int, int]:
        """(epoch, step) that follow."""
        last = progress.step + 1 == self.schedule.steps_per_epoch
        return (progress.epoch + 1, 0) if last else (progress.epoch, progress.step + 1)

    def _forward(self, batch: PackedBatch, counts: Tensor) -> Tensor:
        if self.settings.pin_memory:
            batch = batch.pin_memory()
        return self.model(batch.to(self.parameters.device, non_blocking=self.settings.pin_memory), *counts)

    def _agree(self, loss: float, norm: float) -> Asked:
        """What all ranks do after this step: one rank alone must never decide it."""
        not_finite = 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            not_finite = _OVERFLOWS if self.settings.scales_loss and math.isfinite(loss) else _NOT_FINITE
        late = self.saver is not None and self.saver.is_due(self.schedule.save_every_minutes)
        return Asked(*highest([not_finite, int(late), self.signals.received]))

    def _skip(self, overflows: bool, loss: float, norm: float, losses: list[Tensor], progress: Progress) -> None:
        """Report that this step is skipped, with its documents. Raises `NotFiniteError` where it may not be."""
        scales = self.settings.scales_loss
        scaled = f" at a loss scale of {progress.loss_scale:g}" if scales else ""
        said = f"Step {progress.total_steps + 1}: the loss is {loss}, the gradient norm {norm}{scaled}."
        said = f"{said} {step_faults.suspects(self.order, progress, losses)}"
        may_go_on = progress.loss_scale > LEAST_LOSS_SCALE if overflows else self.settings.skip_not_finite
        if not may_go_on or progress.skipped >= MOST_SKIPPED:
            before = f" {progress.skipped} steps before it were skipped." if progress.skipped else ""
            raise step_faults.not_finite(said + before, scales)
        halved = ", and the loss scale halved" if overflows else ""
        self.reporter.say(f"{said} The step is skipped: nothing is changed by it{halved}.")

    def _update(self, norm: float, lr: float, scale: float) -> float:
        """Step the optimizer; returns what clipping multiplied the gradients by.

        They are `scale` times too large; `norm` is the norm of the true ones.
        """
        clipped = min(1.0, self.schedule.clip_grad / (norm + 1e-6)) if self.schedule.clip_grad > 0 else 1.0
        self.parameters.scale_gradients(1.0 / scale * clipped)
        self._set_learning_rate(lr)
        self.optimizer.step()
        return clipped

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("rate", 1.0)
