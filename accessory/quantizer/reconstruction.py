"""Block-AP (EfficientQAT, Chen et al. 2024): a quantized block is trained to give what the full block gives.

Its input comes from the quantized blocks before it, the wanted output from the full model, so a block also makes up
for errors of those before it. Rounded weights, scales and zeros are trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor, nn

from accessory.quantizer.adam import ImmediateAdam
from accessory.quantizer.weights import LatentWeight

STATISTICS_RATE = 0.004
"""Learning rate of scales and zeros, in mean scales of their matrix."""
CODES_RATE = 0.02
"""Learning rate of codes, in codes."""
_WARM_UP = 8  # steps
_SAID = 8  # steps between lines
_LAST_RATE = 0.05  # of the rate, which ends there on half a cosine


@dataclass(frozen=True)
class Rates:
    """Learning rates of codes, in codes, and of scales and zeros, in mean scales of their matrix."""

    codes: float = CODES_RATE
    statistics: float = STATISTICS_RATE


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """[T, D] twice -> the mean over tokens of |found - wanted|^2 / |wanted|^2, fp32.

    The next block normalizes each token, so that errors count relative to its length: a few tokens (the first of a
    text) have lengths a hundred times the others', and would be all that a sum of squares sees.
    """
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-20)).mean()


def rates_of(weights: Iterable[LatentWeight], rates: Rates) -> Iterator[tuple[nn.Parameter, float]]:
    """Each trained parameter with its learning rate."""
    for weight in weights:
        unit = float(weight.scales.detach().abs().mean())
        for name in weight.trained:
            yield getattr(weight, name), rates.codes if name == "codes" else rates.statistics * unit


def train(
    steps: list[list[int]],
    loss: Callable[[list[int]], Tensor],
    optimizer: ImmediateAdam,
    say: Callable[[str], None] | None = None,
) -> list[float]:
    """One optimizer step for each of `steps`, lists of row numbers, along half a cosine; returns this rank's losses.

    loss: of this rank's rows. say: gets a line every eighth step.
    """
    losses, begun, ranks = [], time.monotonic(), dist.get_world_size(optimizer.group)
    for step, rows in enumerate(steps):
        value = loss(rows)
        optimizer.backward(value / ranks, factor(step, len(steps)))
        losses.append(float(value.detach()))
        if say is not None and (step + 1) % _SAID == 0:
            left = (len(steps) - step - 1) * (time.monotonic() - begun) / (step + 1)
            say(f"step {step + 1:4}/{len(steps)} | loss {sum(losses[-_SAID:]) / _SAID:.4f} | ETA {clock(left)}")
    optimizer.close()
    return losses


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return str(timedelta(seconds=int(seconds)))


def factor(step: int, steps: int) -> float:
    """What the learning rate is multiplied with in one of so many steps, counted from 0."""
    cosine = (1 + math.cos(math.pi * step / steps)) / 2
    return min((step + 1) / _WARM_UP, 1) * (_LAST_RATE + (1 - _LAST_RATE) * cosine)


def summed(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over the ranks of `group`, in place."""
    if dist.get_world_size(group) > 1:
        for tensor in tensors:
            dist.all_reduce(tensor, group=group)


def train_block(
    block: nn.Module,
    weights: list[LatentWeight],
    run: Callable[[list[int]], tuple[Tensor, Tensor]],
    steps: list[list[int]],
    rates: Rates,
    group: dist.ProcessGroup,
) -> list[float]:
    """Train the latent `weights` of a block; returns the losses. run: (found, wanted) outputs [T, D] for rows."""
    block.train()
    optimizer = ImmediateAdam(rates_of(weights, rates), group)
    found = train(steps, lambda rows: relative_error(*run(rows)), optimizer)
    block.eval()
    return found
