"""The errors of a step that cannot be used and of a run that cannot go on, with the step and its documents."""

from __future__ import annotations

import signal

import torch.distributed as dist
from torch import Tensor

from accessory.checkpoint.training_state import FIRST_LOSS_SCALE, Progress
from accessory.data.batch import PackedBatch
from accessory.data.order import Order
from accessory.errors import NotFiniteError, Preempted

_NAMED = 8  # documents in a message


def out_of_memory(number: int, count: int, batch: PackedBatch, progress: Progress, remedies: str) -> str:
    """What is said of micro-batch `number` (from 0) of `count`; `remedies` are flags that make a step smaller."""
    where = f"micro-batch {number + 1} of {count}, which has {_tokens_of(batch)}"
    return f"Step {progress.total_steps + 1}: {_too_large(where, remedies)}"


def out_of_memory_in_update(progress: Progress, remedies: str) -> str:
    """What is said of the update that ends a step."""
    return f"Step {progress.total_steps + 1}: {_too_large('the update of the weights', remedies)}"


def out_of_memory_in_evaluation(what: str | PackedBatch, progress: Progress, remedies: str) -> str:
    """What is said of an evaluation after the steps of `progress`; what: a micro-batch, or what else is computed."""
    when = f"after step {progress.total_steps}" if progress.total_steps else "before the first step"
    where = what if isinstance(what, str) else f"a micro-batch of {_tokens_of(what)}"
    return f"Evaluation {when}: {_too_large(where, remedies)}"


def _tokens_of(batch: PackedBatch) -> str:
    return f"{sum(batch.lengths):,} tokens in documents of {', '.join(map(str, batch.lengths))}"


def _too_large(where: str, remedies: str) -> str:
    return f"out of memory in {where}. What is saved is whole. Less memory is needed with {remedies}."


def suspects(order: Order, progress: Progress, losses: list[Tensor]) -> str:
    """The documents of the step's micro-batches whose loss is not finite, over all ranks, or all. A collective.

    losses: those of this rank's micro-batches.
    """
    batches = order.micro_batches(progress.epoch, progress.step)
    mine = [i for batch, own in zip(batches, losses, strict=True) if not own.isfinite() for i in batch.sample_ids]
    ids = _named(order, mine)
    if ids:
        where = "Documents whose micro-batch has no finite loss"
    else:
        where = "Every micro-batch has a finite loss; documents of the step"
        ids = _named(order, order.documents(progress.epoch, progress.step).tolist())
    shown = ", ".join([*ids.values()][:_NAMED])
    return f"{where}: {shown}{f' and {len(ids) - _NAMED} more' if len(ids) > _NAMED else ''}."


def _named(order: Order, mine: list[int]) -> dict[int, str]:
    """Document -> how a message names it, of all ranks' documents, the first ones named. A collective."""
    first = {i: order.where(i) if place < _NAMED else "" for place, i in enumerate(sorted(set(mine)))}
    of_all: list[dict[int, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_all, first)
    return dict(sorted(item for of_one in of_all for item in of_one.items()))


def not_finite(said: str, scales_loss: bool) -> NotFiniteError:
    """The error, common to all ranks, that says `said` and what may help."""
    wider = "give --precision bf16 or fp32, whose range is wider, " if scales_loss else ""
    ways = f"Look at the documents, {wider}lower --lr, or set --clip_grad; what is saved is whole."
    return NotFiniteError(f"{said} {ways}", common=True)


def nothing_learned(progress: Progress, scales_loss: bool) -> NotFiniteError:
    """The error of a run that is over and skipped every step."""
    said = f"All {progress.skipped} steps of the run were skipped: nothing was learned."
    if scales_loss and progress.loss_scale < FIRST_LOSS_SCALE:
        scale = f"The loss scale, {progress.loss_scale:g} by now, was still being lowered"
        said = f"{said} {scale}: give more --max_steps or --epochs."
    return not_finite(said, scales_loss)


def preempted(number: int, progress: Progress, saved: bool) -> Preempted:
    """How a run ends, on all ranks, after one of them got the signal `number`; saved: whether the run saves at all."""
    if progress.total_steps == 0:
        return Preempted(
            f"Stopped by {signal.Signals(number).name} before the first step; nothing was saved.", common=True
        )
    rest = ". Nothing is saved: this run writes nothing."
    if saved:
        rest = f", which is saved as {progress.checkpoint_name}. Go on with --resume latest."
    return Preempted(f"Stopped by {signal.Signals(number).name} after step {progress.total_steps}{rest}", common=True)
