"""The one training loop: batches -> loss -> step -> log -> save. It knows no family, method or format by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.checkpoint.training_state import Progress
from accessory.data.batch import PackedBatch
from accessory.data.order import GlobalOrder
from accessory.errors import NotFiniteError, OutOfMemoryError, Preempted
from accessory.optim import (
    FIRST_LOSS_SCALE,
    LEAST_LOSS_SCALE,
    gradient_norm,
    learning_rate,
    next_loss_scale,
    scale_gradients,
    sum_partial_gradients,
)
from accessory.parallel.agree import highest
from accessory.parallel.data import DataParallel, sum_over_data_parallel
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import Slicing
from accessory.run.report import Reporter, StepReport, peak_memory
from accessory.run.signals import StopSignals, name_of

MOST_SKIPPED = int(math.log2(FIRST_LOSS_SCALE / LEAST_LOSS_SCALE))
"""Steps in a row that may be skipped: as many as it takes to bring fp16's loss scale down to its floor."""
_NAMED = 8  # documents in a message
_OVERFLOWS = 1  # only the gradient, in fp16: a smaller loss scale may mend it
_NOT_FINITE = 2


@dataclass(frozen=True)
class Schedule:
    """How long to train, how fast, and when to save. Steps are optimizer steps."""

    epochs: int
    steps_per_epoch: int
    warmup_epochs: float
    lr: float
    min_lr: float
    clip_grad: float
    save_every_epochs: int
    save_every_steps: int
    max_steps: int | None = None
    save_every_minutes: float | None = None
    skipped_count: bool = True
    """Whether steps that changed nothing count towards `max_steps`."""

    def is_over(self, progress: Progress) -> bool:
        """Whether nothing is left to train."""
        taken = progress.total_steps - (0 if self.skipped_count else progress.skipped)
        return progress.epoch >= self.epochs or (self.max_steps is not None and taken >= self.max_steps)

    def total_steps(self, progress: Progress) -> int:
        """Steps of the whole run, those up to `progress` included."""
        planned = progress.total_steps + (self.epochs - progress.epoch) * self.steps_per_epoch - progress.step
        return min(planned, self.max_steps) if self.max_steps else planned

    def learning_rate(self, epoch: float) -> float:
        """At a fractional epoch; a step is given the epoch at its end, so that the first one already learns."""
        return learning_rate(
            epoch, lr=self.lr, min_lr=self.min_lr, warmup_epochs=self.warmup_epochs, epochs=self.epochs
        )


class Asked(NamedTuple):
    """What at least one rank asks of all: to skip the step (and why), to save, to stop (the signal it got)."""

    not_finite: int
    save: int
    stop: int


@dataclass
class Engine:
    """Trains `model`, whose trained parameters are `parameters` (by name, fp32, cut as `slicings` says).

    `save(progress, name, loss)` is given the mean loss since the save before; None: the run writes nothing. With
    `skip_not_finite`, a step whose loss or gradient is not finite changes nothing, instead of ending the run. With
    `scales_loss`, which fp16 needs, the loss is multiplied by `Progress.loss_scale` before the backward. `spare_memory`
    says what makes a step smaller.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    slicings: dict[str, Slicing]
    optimizer: torch.optim.Optimizer
    order: GlobalOrder
    schedule: Schedule
    data_parallel: DataParallel
    layout: Layout
    reporter: Reporter
    save: Callable[[Progress, str, float | None], None] | None
    signals: StopSignals
    scales_loss: bool = False
    pin_memory: bool = False
    skip_not_finite: bool = False
    spare_memory: str = ""
    _losses: list[float] = field(default_factory=list, init=False)  # since the last save
    _saved_at_time: float = field(default_factory=time.monotonic, init=False)

    def train(self, progress: Progress) -> None:
        """Run from `progress` to the end of the schedule, saving on the way and at the end.

        Raises, on all ranks after the same step: `Preempted` once it is saved, where one of them was asked to stop;
        `NotFiniteError`. On the one rank it happens to: `OutOfMemoryError`.
        """
        self.model.train()
        schedule, saved_at = self.schedule, progress.total_steps
        while not schedule.is_over(progress):
            report, asked = self.step(progress)
            self.reporter.step(report)
            if progress.step == schedule.steps_per_epoch:
                progress.epoch, progress.step = progress.epoch + 1, 0
            if schedule.is_over(progress) and progress.skipped == progress.total_steps:
                raise self._nothing_learned(progress)
            if asked.stop or asked.save or self._is_time_to_save(progress):
                self._save(progress)
                saved_at = progress.total_steps
            if asked.stop and not schedule.is_over(progress):
                raise self._preempted(asked.stop, progress)
        if saved_at != progress.total_steps:
            self._save(progress)
        if skipped := progress.total_steps - max((int(s["step"]) for s in self.optimizer.state.values()), default=0):
            last = f", the last {progress.skipped} among them" if progress.skipped else ""
            self.reporter.say(f"{skipped} of the run's {progress.total_steps} steps were skipped{last}.")

    def step(self, progress: Progress) -> tuple[StepReport, Asked]:
        """One optimizer step on one global batch; moves `progress` on by it."""
        began = time.monotonic()
        at = progress.epoch, progress.step
        supervised = self.order.supervised_tokens(*at)
        scale = progress.loss_scale if self.scales_loss else 1.0
        losses = self._accumulate(progress, scale / supervised)
        loss = (sum_over_data_parallel(torch.stack(losses).sum()) / supervised).item()
        sum_partial_gradients(self.parameters, self.slicings)
        norm = gradient_norm(self.parameters, self.slicings).item() / scale
        asked = self._agree(loss, norm)
        epoch = progress.epoch + (progress.step + 1) / self.schedule.steps_per_epoch
        lr = self.schedule.learning_rate(epoch)
        if asked.not_finite:
            self._skip(asked.not_finite == _OVERFLOWS, loss, norm, losses, progress)
        else:
            self._update(norm, lr, scale)
            self._losses.append(loss)
        self.optimizer.zero_grad(set_to_none=True)
        if self.scales_loss and asked.not_finite != _NOT_FINITE:
            progress.loss_scale, progress.good_steps = next_loss_scale(
                progress.loss_scale, progress.good_steps, finite=not asked.not_finite
            )
        progress.skipped = progress.skipped + 1 if asked.not_finite else 0
        progress.step, progress.total_steps = progress.step + 1, progress.total_steps + 1
        return StepReport(
            step=progress.total_steps,
            epoch=epoch,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=self.order.tokens(*at),
            supervised=supervised,
            seconds=time.monotonic() - began,
            peak_bytes=peak_memory(self.layout.device),
        ), asked

    def _accumulate(self, progress: Progress, factor: float) -> list[Tensor]:
        """Gradients of the global batch's loss, summed over tokens, times `factor`; returns each micro-batch's sum.

        fp64 scalars, on the device, without the factor.
        """
        pending = list(self.order.micro_batches(progress.epoch, progress.step))
        losses = []
        for i, batch in enumerate(pending):
            self.data_parallel.reduce_gradients(self.model, last=i == len(pending) - 1)
            try:
                loss = self._forward(batch)
                (loss * factor).backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise self._out_of_memory(i, len(pending), batch, progress) from error
            losses.append(loss.detach().double())
        return losses

    def _forward(self, batch: PackedBatch) -> Tensor:
        if self.pin_memory:
            batch = batch.pin_memory()
        return self.model(batch.to(self.layout.device, non_blocking=self.pin_memory))

    def _agree(self, loss: float, norm: float) -> Asked:
        """What all ranks do about this step, since one alone must never decide."""
        not_finite = 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            not_finite = _OVERFLOWS if self.scales_loss and math.isfinite(loss) else _NOT_FINITE
        minutes = self.schedule.save_every_minutes
        late = minutes is not None and time.monotonic() - self._saved_at_time >= 60 * minutes
        return Asked(*highest([not_finite, int(late), self.signals.received], self.layout.device))

    def _skip(self, overflows: bool, loss: float, norm: float, losses: list[Tensor], progress: Progress) -> None:
        """Report that this step is skipped, with its documents. Raises `NotFiniteError` where it may not be."""
        batches = self.order.micro_batches(progress.epoch, progress.step)
        mine = [i for batch, own in zip(batches, losses, strict=True) if not own.isfinite() for i in batch.sample_ids]
        of_all: list[list[int]] = [[]] * self.layout.world_size
        dist.all_gather_object(of_all, mine)
        ids = sorted({i for of_one in of_all for i in of_one})
        if ids:
            where = "Documents whose micro-batch has no finite loss"
        else:
            where = "Every micro-batch has a finite loss; documents of the step"
            ids = sorted(self.order.global_ids(progress.epoch, progress.step).tolist())
        shown = ", ".join(self.order.corpus.where(i) for i in ids[:_NAMED])
        scaled = f" at a loss scale of {progress.loss_scale:g}" if self.scales_loss else ""
        said = (
            f"Step {progress.total_steps + 1}: the loss is {loss}, the gradient norm {norm}{scaled}. {where}: {shown}"
            f"{f' and {len(ids) - _NAMED} more' if len(ids) > _NAMED else ''}."
        )
        may_go_on = progress.loss_scale > LEAST_LOSS_SCALE if overflows else self.skip_not_finite
        if may_go_on and progress.skipped < MOST_SKIPPED:
            halved = ", and the loss scale halved" if overflows else ""
            self.reporter.say(f"{said} The step is skipped: nothing is changed by it{halved}.")
            return
        raise self._fault(f"{said}{f' {progress.skipped} steps before it were skipped.' if progress.skipped else ''}")

    def _nothing_learned(self, progress: Progress) -> NotFiniteError:
        said = f"All {progress.skipped} steps of the run were skipped: nothing was learned."
        if self.scales_loss and progress.loss_scale < FIRST_LOSS_SCALE:
            scale = f"The loss scale, {progress.loss_scale:g} by now, was still being lowered"
            said = f"{said} {scale}: give more --max_steps or --epochs."
        return self._fault(said)

    def _fault(self, said: str) -> NotFiniteError:
        wider = "give --precision bf16 or fp32, whose range is wider, " if self.scales_loss else ""
        ways = f"Look at the documents, {wider}lower --lr, or set --clip_grad; what is saved is whole."
        return NotFiniteError(f"{said} {ways}", common=True)

    def _out_of_memory(self, number: int, count: int, batch: PackedBatch, progress: Progress) -> OutOfMemoryError:
        return OutOfMemoryError(
            f"Step {progress.total_steps + 1}: out of memory in micro-batch {number + 1} of {count}, which has "
            f"{sum(batch.lengths):,} tokens in documents of {', '.join(map(str, batch.lengths))}. "
            f"What is saved is whole. Less memory is needed with {self.spare_memory}."
        )

    def _update(self, norm: float, lr: float, scale: float) -> None:
        """Step the optimizer. The gradients are `scale` times too large; `norm` is the norm of the true ones."""
        factor = 1.0 / scale
        if self.schedule.clip_grad > 0:
            factor *= min(1.0, self.schedule.clip_grad / (norm + 1e-6))
        scale_gradients(self.parameters, factor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def _save(self, progress: Progress) -> None:
        mean = sum(self._losses) / len(self._losses) if self._losses else None
        if self.save:
            self.save(progress, self.checkpoint_name(progress), mean)
        self._losses, self._saved_at_time = [], time.monotonic()

    def _preempted(self, number: int, progress: Progress) -> Preempted:
        if self.save:
            rest = f", which is saved as {self.checkpoint_name(progress)}. Go on with --resume latest."
        else:
            rest = ". Nothing is saved: this run writes nothing."
        return Preempted(f"Stopped by {name_of(number)} after step {progress.total_steps}{rest}", common=True)

    def _is_time_to_save(self, progress: Progress) -> bool:
        if progress.step == 0:
            return progress.epoch % self.schedule.save_every_epochs == 0
        return progress.step % self.schedule.save_every_steps == 0

    def checkpoint_name(self, progress: Progress) -> str:
        """`epochN` after N's last step (N from 0), `epochN-iterM` after M steps within it."""
        return f"epoch{progress.epoch - 1}" if progress.step == 0 else f"epoch{progress.epoch}-iter{progress.step}"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on a GPU or on the CPU, whose allocator has no error of its own for it."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
