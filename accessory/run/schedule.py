"""A run's schedule: how many steps it has, the learning rate of each, after which it is saved and evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from accessory.checkpoint.training_state import Progress
from accessory.config import FinetuneConfig, PretrainConfig
from accessory.data.order import GlobalOrder, Order

_FLAGS = ("epochs", "warmup_epochs", "lr", "min_lr", "lr_schedule", "clip_grad")
_EVALUATED_EVERY = 10_000  # micro-batches of pretraining, as upstream
FEW_STEPS = 30
"""A run with fewer optimizer steps prints a note."""


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
    lr_schedule: str = "cosine"
    """One of `LR_SCHEDULES`."""
    eval_steps: int | None = None
    """Steps from one evaluation to the next; None: `eval_epochs` says it."""
    eval_epochs: float = 1.0
    """Epochs from one evaluation to the next."""
    decay_epochs: float | None = None
    """Epochs until the learning rate is at its end; None: `epochs`."""

    def is_over(self, progress: Progress) -> bool:
        """Whether nothing is left to train."""
        taken = progress.total_steps - (0 if self.skipped_count else progress.skipped)
        return progress.epoch >= self.epochs or (self.max_steps is not None and taken >= self.max_steps)

    def total_steps(self, progress: Progress) -> int:
        """Steps of the whole run, those up to `progress` included."""
        planned = progress.total_steps + (self.epochs - progress.epoch) * self.steps_per_epoch - progress.step
        return min(planned, self.max_steps) if self.max_steps else planned

    def learning_rate(self, epoch: float) -> float:
        """Linear from 0 to `lr` over `warmup_epochs`, then constant or half a cosine down to `min_lr` at its end.

        `epoch` is fractional: that of a step is at its end, so that the first one already learns.
        """
        if epoch < self.warmup_epochs:
            return self.lr * epoch / self.warmup_epochs
        if self.lr_schedule == "constant":
            return self.lr
        last = self.epochs if self.decay_epochs is None else self.decay_epochs
        progress = min((epoch - self.warmup_epochs) / max(last - self.warmup_epochs, 1e-9), 1.0)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))

    def saves_after(self, progress: Progress) -> bool:
        """Whether the steps or epochs that are done make it time to save."""
        if progress.step == 0:
            return progress.epoch % self.save_every_epochs == 0
        return progress.step % self.save_every_steps == 0

    def evaluates_after(self, progress: Progress) -> bool:
        """Whether it is time to evaluate: before the first step, and whenever the next multiple is reached."""
        if self.eval_steps:
            return progress.total_steps % self.eval_steps == 0
        if progress.total_steps == 0:
            return True
        steps = progress.epoch * self.steps_per_epoch + progress.step
        before, now = (math.floor(n / self.steps_per_epoch / self.eval_epochs + 1e-9) for n in (steps - 1, steps))
        return now > before


def schedule_of(config: FinetuneConfig, order: GlobalOrder, progress: Progress) -> Schedule:
    """The schedule that the flags ask for; a dry run takes one true step from `progress` on."""
    return Schedule(
        **{name: getattr(config, name) for name in _FLAGS},
        steps_per_epoch=order.steps_per_epoch,
        save_every_epochs=config.save_interval,
        save_every_steps=config.save_steps or max(config.save_iteration_interval // config.accum_iter, 1),
        save_every_minutes=config.save_minutes,
        max_steps=progress.total_steps + 1 if config.dry_run else config.max_steps,
        skipped_count=not config.dry_run,
        eval_steps=config.eval_steps,
        eval_epochs=config.eval_epochs or 1.0,
    )


def pretraining_schedule(config: PretrainConfig, order: Order, progress: Progress) -> Schedule:
    """The schedule that the flags of pretraining ask for, which count micro-batches; a dry run takes one step."""
    an_epoch = order.steps_per_epoch * config.accum_iter
    return Schedule(
        epochs=config.epochs,
        steps_per_epoch=order.steps_per_epoch,
        warmup_epochs=config.warmup_iters / an_epoch,
        decay_epochs=config.lr_decay_iters / an_epoch,
        lr=config.lr,
        min_lr=config.min_lr,
        clip_grad=config.clip_grad,
        save_every_epochs=1,
        save_every_steps=max(config.save_freq // config.accum_iter, 1),
        save_every_minutes=config.save_minutes,
        max_steps=progress.total_steps + 1 if config.dry_run else config.max_steps,
        skipped_count=not config.dry_run,
        eval_steps=config.eval_steps or max(_EVALUATED_EVERY // config.accum_iter, 1),
    )


def pretraining_notes(config: PretrainConfig, order: Order, schedule: Schedule, progress: Progress) -> list[str]:
    """Lines on how many steps the run has, and on where its learning rate will stand in the end."""
    steps = replace(schedule, max_steps=config.max_steps).total_steps(progress)
    tokens = order.tokens(progress.epoch, progress.step)
    notes = [
        f"optimizer steps: {steps:,}, {order.steps_per_epoch:,} a pass over the data, of {order.global_batch} rows of "
        f"{config.max_words:,} tokens each; {steps * tokens:,} tokens in all"
    ]
    reached = schedule.learning_rate(steps / order.steps_per_epoch)
    if steps * config.accum_iter < config.lr_decay_iters:
        notes.append(
            f"the run ends after {steps * config.accum_iter:,} micro-batches, at a learning rate of {reached:.2e}: "
            f"--warmup_iters is {config.warmup_iters:,}, --lr_decay_iters {config.lr_decay_iters:,}"
        )
    return notes


def schedule_notes(config: FinetuneConfig, order: GlobalOrder, schedule: Schedule, progress: Progress) -> list[str]:
    """Lines on how many steps the run has, and on what to change if they are too few to learn from."""
    steps = replace(schedule, max_steps=config.max_steps).total_steps(progress)  # not the one of a dry run
    epochs = steps / order.steps_per_epoch
    notes = [f"optimizer steps: {steps:,}, {order.steps_per_epoch:,} an epoch, of {order.global_batch} documents each"]
    if schedule.warmup_epochs >= epochs:
        reached = schedule.learning_rate(epochs)
        notes.append(
            f"the run ends within its warm-up, at a learning rate of {reached:.2e}: --warmup_epochs is "
            f"{schedule.warmup_epochs:g}, the run {epochs:.3g} epochs"
        )
    if steps < FEW_STEPS and config.max_steps is None:
        smaller = [f"a smaller --{name}" for name in ("accum_iter", "batch_size") if getattr(config, name) > 1]
        ways = " or ".join(["more --epochs", *smaller])
        notes.append(f"{steps} steps may be too few to learn anything; for more steps give {ways}")
    return notes
