"""Evaluates a model while it is trained: loss, perplexity, accuracy and answers, without a trace in the training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.checkpoint.training_state import Progress
from accessory.checkpoint.validation_state import ValidationState
from accessory.data.batch import PackedBatch
from accessory.data.order import GlobalOrder
from accessory.memory.exhausted import out_of_memory_as
from accessory.parallel.agree import highest
from accessory.parallel.data import sum_over_data_parallel
from accessory.parallel.groups import supervised, tick
from accessory.run.report import EvaluationReport, Figures, Reporter, Task
from accessory.run.schedule import Schedule
from accessory.run.signals import StopSignals
from accessory.run.step_faults import out_of_memory_in_evaluation


class Outcome(NamedTuple):
    """Of an evaluation: whether the loss is the lowest so far; the signal that cut it short, or 0."""

    best: bool = False
    stop: int = 0


@dataclass
class Validation:
    """Evaluates `model` on all documents of `order`, which are dealt over the ranks as one step.

    model: has `teacher`, `token_scores`, `question` and `generate` as `MetaModel` does. sources: a name for each entry
    of the data. questions: answered at each evaluation, in at most `answer_tokens` tokens. patience: evaluations in a
    row without a lower loss after which training is to end; None: never. tasks: given to the model at each evaluation,
    on all ranks. memory_remedies: flags that make a step smaller, named in the error if memory runs out.
    """

    model: nn.Module
    order: GlobalOrder
    sources: list[str]
    schedule: Schedule
    state: ValidationState
    reporter: Reporter
    signals: StopSignals
    device: torch.device
    questions: list[str] = field(default_factory=list)
    answer_tokens: int = 0
    patience: int | None = None
    tasks: tuple[Task, ...] = ()
    memory_remedies: str = ""

    @property
    def is_over(self) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and self.state.waited >= self.patience

    def catch_up(self, progress: Progress) -> Outcome:
        """Evaluate before the next step if that is due at `progress` and not done yet. A collective."""
        if self.state.evaluated == progress.total_steps or not self.schedule.evaluates_after(progress):
            return Outcome()
        return self._evaluate(progress)

    def after(self, progress: Progress, last: bool) -> Outcome:
        """Evaluate if that is due after the step that was just made; the `last` one always is. A collective."""
        return self._evaluate(progress) if last or self.schedule.evaluates_after(progress) else Outcome()

    def closing_words(self) -> str | None:
        """How it went, for the end of a run."""
        state = self.state
        if state.best is None:
            return None
        where = f"the lowest validation loss, {state.best:.4f}, is that after step {state.best_step}"
        if state.before is not None and state.best >= state.before:
            where += (
                f"; before the first step it was lower, {state.before:.4f}: nothing was learned for these documents"
            )
        ended = (
            f"ended early: {state.waited} evaluations in a row without a lower validation loss; "
            if self.is_over
            else ""
        )
        return ended + where

    def _evaluate(self, progress: Progress) -> Outcome:
        began = time.monotonic()
        with _evaluating(self.model, self.device), supervised():
            sums, stop = self._sums(progress)
            if stop:
                return Outcome(stop=stop)
            fewer = "fewer --sample_prompts, a smaller --sample_tokens"
            with self._memory_for(f"answers to {len(self.questions)} --sample_prompts", progress, fewer):
                samples = self._samples()
            with self._memory_for("questions of --mmlu", progress):
                tasks = tuple(task(self.model) for task in self.tasks)
        steps = self.schedule.steps_per_epoch
        total = _figures(sums.sum(0))
        self.reporter.evaluation(EvaluationReport(
            step=progress.total_steps,
            epoch=progress.epoch + progress.step / steps,
            figures=total,
            sources={name: _figures(row) for name, row in zip(self.sources, sums, strict=True) if row[2]}
            if len(self.sources) > 1 else {},
            documents=len(self.order.ids),
            samples=samples,
            seconds=time.monotonic() - began,
            tasks=tasks,
        ))  # fmt: skip
        return Outcome(best=self.state.note(progress.total_steps, total.loss))

    def _memory_for(
        self, what: str | PackedBatch, progress: Progress, remedies: str = ""
    ) -> AbstractContextManager[None]:
        """A context in which memory that runs out is told with what was computed."""
        said = partial(out_of_memory_in_evaluation, what, progress, remedies or self.memory_remedies)
        return out_of_memory_as(said)

    def _sums(self, progress: Progress) -> tuple[Tensor, int]:
        """(for each source the sums that `_figures` takes, fp64 [sources, 3 or 4]; signal or 0)."""
        sums = torch.zeros(len(self.sources), 4 if self.model.teacher else 3, dtype=torch.float64)
        for batch in self.order.micro_batches(0, 0):
            if stop := highest([self.signals.received])[0]:
                return sums, stop
            tick()
            with self._memory_for(batch, progress):
                self._add(batch, sums)
        sum_over_data_parallel(sums)
        if dist.get_world_size() > 1:
            dist.broadcast(sums, 0)  # what follows from them must be equal on all ranks, to the last bit
        return sums, 0

    def _add(self, batch: PackedBatch, sums: Tensor) -> None:
        log_p, likeliest, divergences = self.model.token_scores(batch.to(self.device), taught=True)
        if not batch.sample_ids:
            return  # a rank that has no document takes part in what all compute
        of_document = torch.from_numpy(self.order.corpus.origins[list(batch.sample_ids), 0]).long()
        own = torch.tensor(batch.lengths) - torch.tensor(batch.shared)
        source = of_document.repeat_interleave(own)[batch.labels >= 0]
        each = [-log_p, likeliest, torch.ones_like(log_p)] + ([] if divergences is None else [divergences])
        sums.index_add_(0, source, torch.stack([one.double() for one in each], 1).cpu())

    def _samples(self) -> list[tuple[str, str]]:
        """The questions with the likeliest answers; equal on all ranks."""
        if not self.questions:
            return []
        prompts = [self.model.question(question) for question in self.questions]
        answers = self.model.generate(prompts, max_gen_len=self.answer_tokens, temperature=0.0)
        return list(zip(self.questions, answers, strict=True))


def _figures(sums: Tensor) -> Figures:
    """Sums of -log p, of tokens predicted, of tokens and, with a teacher, of divergences -> their means."""
    loss, likeliest, tokens, *divergence = sums.tolist()
    if not tokens:
        return Figures(math.nan, math.nan, 0)
    return Figures(loss / tokens, likeliest / tokens, round(tokens), *(each / tokens for each in divergence))


@contextmanager
def _evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Without gradients and dropout; afterwards mode and random generators are as before."""
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        model.eval()
        try:
            yield
        finally:
            model.train()
