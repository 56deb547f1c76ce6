"""The one training loop: batches -> loss -> step -> log -> save. It knows no family, method or format by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from accessory.checkpoint.training_state import Progress
from accessory.data.batch import PackedBatch
from accessory.data.order import GlobalOrder
from accessory.errors import TrainingError
from accessory.optim import (
    LossScale,
    gradient_norm,
    learning_rate,
    scale_gradients,
    sum_partial_gradients,
)
from accessory.parallel.data import DataParallel, sum_over_data_parallel
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import Slicing
from accessory.report import Reporter, StepReport, peak_memory


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

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        planned = self.epochs * self.steps_per_epoch
        return min(planned, self.max_steps) if self.max_steps else planned

    def learning_rate(self, epoch: float) -> float:
        """At a fractional epoch; a step is given the epoch at its end, so that the first one already learns."""
        return learning_rate(
            epoch, lr=self.lr, min_lr=self.min_lr, warmup_epochs=self.warmup_epochs, epochs=self.epochs
        )


@dataclass
class Engine:
    """Trains `model`, whose trained parameters are `parameters` (by name, fp32, cut as `slicings` says)."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    slicings: dict[str, Slicing]
    optimizer: torch.optim.Optimizer
    order: GlobalOrder
    schedule: Schedule
    data_parallel: DataParallel
    layout: Layout
    reporter: Reporter
    save: Callable[[Progress, str], None]
    loss_scale: LossScale
    pin_memory: bool = False

    def train(self, progress: Progress) -> None:
        """Run from `progress` to the end of the schedule, saving on the way and at the end."""
        self.model.train()
        self.loss_scale.value = progress.loss_scale if self.loss_scale.enabled else 1.0
        self.loss_scale.good_steps = progress.good_steps
        schedule, saved_at = self.schedule, progress.total_steps
        while progress.total_steps < schedule.total_steps:
            self.reporter.step(self.step(progress))
            if progress.step == schedule.steps_per_epoch:
                progress.epoch, progress.step = progress.epoch + 1, 0
            if self._is_time_to_save(progress):
                self.save(progress, self.checkpoint_name(progress))
                saved_at = progress.total_steps
        if saved_at != progress.total_steps:
            self.save(progress, self.checkpoint_name(progress))

    def step(self, progress: Progress) -> StepReport:
        """One optimizer step on one global batch; moves `progress` on by it."""
        began = time.monotonic()
        at = progress.epoch, progress.step
        supervised = self.order.supervised_tokens(*at)
        loss = self._accumulate(self.order.micro_batches(*at), supervised)
        sum_partial_gradients(self.parameters, self.slicings)
        norm = gradient_norm(self.parameters, self.slicings).item() / self.loss_scale.value
        self._check_finite(loss, norm, progress)
        progress.step, progress.total_steps = progress.step + 1, progress.total_steps + 1
        epoch = progress.epoch + progress.step / self.schedule.steps_per_epoch
        lr = self.schedule.learning_rate(epoch)
        self._update(norm, lr)
        progress.loss_scale, progress.good_steps = self.loss_scale.value, self.loss_scale.good_steps
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
        )

    def _accumulate(self, batches: Iterator[PackedBatch], supervised: int) -> float:
        """Gradients of the mean loss over the global batch's supervised tokens; returns that mean."""
        pending = list(batches)
        total = torch.zeros((), dtype=torch.float64, device=self.layout.device)
        for i, batch in enumerate(pending):
            self.data_parallel.reduce_gradients(self.model, last=i == len(pending) - 1)
            if self.pin_memory:
                batch = batch.pin_memory()
            loss = self.model(batch.to(self.layout.device, non_blocking=self.pin_memory))
            (loss * (self.loss_scale.value / supervised)).backward()
            total += loss.detach()
        return (sum_over_data_parallel(total) / supervised).item()

    def _check_finite(self, loss: float, norm: float, progress: Progress) -> None:
        """Loss and norm are equal on all ranks, so all stop together; fp16 lowers its scale instead."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.loss_scale.enabled):
            return
        ids = self.order.global_ids(progress.epoch, progress.step).tolist()
        fault = TrainingError(
            f"Step {progress.total_steps + 1}: the loss is {loss}, the gradient norm {norm}. "
            f"Lower --lr, set --clip_grad, or look at the documents of this step: {ids[:16]}."
        )
        fault.common = True
        raise fault

    def _update(self, norm: float, lr: float) -> None:
        finite = math.isfinite(norm)
        if finite:
            factor = 1.0 / self.loss_scale.value
            if self.schedule.clip_grad > 0:
                factor *= min(1.0, self.schedule.clip_grad / (norm + 1e-6))
            scale_gradients(self.parameters, factor)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.loss_scale.update(finite)
        self.optimizer.zero_grad(set_to_none=True)

    def _is_time_to_save(self, progress: Progress) -> bool:
        if progress.step == 0:
            last = progress.epoch == self.schedule.epochs
            return last or progress.epoch % self.schedule.save_every_epochs == 0
        return progress.step % self.schedule.save_every_steps == 0

    def checkpoint_name(self, progress: Progress) -> str:
        """`epochN` after N's last step (N from 0), `epochN-iterM` after M steps within it."""
        return f"epoch{progress.epoch - 1}" if progress.step == 0 else f"epoch{progress.epoch}-iter{progress.step}"
