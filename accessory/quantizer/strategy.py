"""Which linears of a mix get four bits: those whose error at two bits harms the model most for the bits they cost.

What a linear's error costs is the sum over its outputs n of E[g_n^2] * dW_n H dW_n^T: g is the gradient of the loss by
the output, H the second moments of the inputs, dW what the grid makes of W. The choice is written in the schema of
GreenBit's quant_strategy.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from accessory.checkpoint.strategy import GREENBIT_NAMES, MEASUREMENT
from accessory.errors import ConfigError
from accessory.errors import nearest as nearest_name
from accessory.model.block import Block
from accessory.model.loss import cross_entropy_sum
from accessory.model.sequences import Sequences
from accessory.quant import MIXES, QUANT_TYPES, mixes
from accessory.quant.groups import GROUP_STORAGES
from accessory.quantizer.blocks import Blocks, by_input, linears, replace_weight
from accessory.quantizer.gptq import DAMPING, output_error
from accessory.quantizer.grid import Grid, fit, nearest
from accessory.quantizer.weights import Moments, WatchedWeight

Width = tuple[int, int]
"""(bits, columns of a group)."""
NARROW, WIDE = ((kind.bits, kind.group) for kind in (mixes.NARROW, mixes.WIDE))
"""Widths of a mix's linears."""


class Gain(NamedTuple):
    """By how much the loss is expected to fall where a linear has `WIDE` instead of `NARROW`; its number of weights."""

    gain: float
    weights: int


def choose(gains: dict[str, Gain], share: float) -> dict[str, Width]:
    """Name of each linear -> its width: those of most gain for each weight are wide, at most `share` of all weights."""
    room = share * sum(gain.weights for gain in gains.values())
    chosen = dict.fromkeys(gains, NARROW)
    for name in sorted(gains, key=lambda name: (-gains[name].gain / gains[name].weights, name)):
        if gains[name].weights <= room:
            chosen[name] = WIDE
            room -= gains[name].weights
    return chosen


def measure(blocks: Blocks, rows: Tensor, batch: int) -> Iterator[dict[str, Gain]]:
    """The gains of the linears of each block by full name, the last block first; rows: token ids [R, S] on the CPU.

    One forward and one backward, a block at a time, `batch` rows at a time. Between blocks it holds the inputs of all.
    """
    device, length = blocks.layout.device, rows.shape[1]
    sequences = [blocks.sequences(len(part), length) for part in rows.split(batch)]
    states = [[]]
    with torch.no_grad():
        for part, where in zip(rows.split(batch), sequences, strict=True):
            states[0].append(blocks.decoder.enter(part.flatten().to(device), where))
        for index in range(len(blocks)):
            block = blocks.load(index)
            states.append([block(x, where) for x, where in zip(states[-1], sequences, strict=True)])
            del block
    pairs = zip(states.pop(), rows.split(batch), strict=True)
    gradients = [_loss_gradient(blocks, x, ids) for x, ids in pairs]
    for index in reversed(range(len(blocks))):
        block = blocks.load(index)
        watched = watch(block)
        gradients = [
            _through(block, x, where, dy) for x, where, dy in zip(states.pop(), sequences, gradients, strict=True)
        ]
        yield {
            f"layers.{index}.{name}": Gain(_gain(weight.codes.detach().float(), weight.moments), weight.codes.numel())
            for name, weight in watched.items()
        }
        del block


def watch(block: Block) -> dict[str, WatchedWeight]:
    """Have a block's linears note moments: the matrices that do so, by name."""
    found, watched = linears(block), {}
    for names in by_input(block):
        first = Moments()
        for name in names:
            moments = first if name == names[0] else Moments(shared=first)
            watched[name] = WatchedWeight(found[name].weight, moments)
            replace_weight(found[name], watched[name])
    return watched


def _loss_gradient(blocks: Blocks, x: Tensor, ids: Tensor) -> Tensor:
    """Of the summed cross-entropy of the next tokens, by the last block's output [T, D]."""
    labels = torch.full_like(ids, -1)
    labels[:, :-1] = ids[:, 1:]
    x = x.detach().requires_grad_(True)
    decoder = blocks.decoder
    loss = cross_entropy_sum(
        decoder.leave(x), decoder.head_weight, labels.flatten().to(x.device), decoder.args.vocab_size
    )
    return torch.autograd.grad(loss, x)[0]


def _through(block: Block, x: Tensor, where: Sequences, dy: Tensor) -> Tensor:
    """The gradient by a block's input, of the one by its output."""
    x = x.detach().requires_grad_(True)
    block(x, where).backward(dy)
    return x.grad


def _gain(weight: Tensor, moments: Moments) -> float:
    """The difference of both widths' costs."""
    hessian = moments.hessian()
    importance = hessian.diagonal() + DAMPING * hessian.diagonal().mean()
    costs = []
    for bits, group in (NARROW, WIDE):
        found = rounded(weight, importance, bits, group).weights()
        costs.append(float((moments.gradients * output_error(found.sub_(weight), hessian)).sum()))
    return costs[0] - costs[1]


def rounded(weight: Tensor, importance: Tensor, bits: int, group: int) -> Grid:
    """W [N, K] fp32 on the grid that suits the columns' importance [K], without error feedback."""
    columns, top = weight.t(), 2**bits - 1
    codes, statistics = torch.empty_like(columns), []
    for start in range(0, len(columns), group):
        own = slice(start, start + group)
        scale, zero = fit(columns[own], importance[own], top)
        codes[own] = nearest(columns[own], scale, zero, top)
        statistics.append((scale, zero))
    scales, zeros = (torch.stack(each, 1) for each in zip(*statistics, strict=True))
    return Grid(codes.t().contiguous(), scales, zeros, bits, group)


def strategy_document(widths: dict[str, Width]) -> dict[str, Any]:
    """The content of quant_strategy.json: full name of each linear -> its width."""
    blocks: dict[str, Any] = {}
    for name, (bits, group) in widths.items():
        _, index, linear = name.split(".", 2)
        sizes = {str(width[0]): width[1] for width in {NARROW, WIDE, (bits, group)}}
        blocks.setdefault(f"model.layers.{index}", {})[GREENBIT_NAMES[linear]] = {
            "group_size": dict(sorted(sizes.items())),
            "bits": [bits],
            "bits_prop": [1.0],
            "scale_bits": 4,
        }
    return {MEASUREMENT: blocks}


def widths_of(quant_type: str) -> Width | None:
    """The width of all linears, by the name of a storage such as int2_g64; None for a mix. Raises `ConfigError`."""
    if quant_type in MIXES:
        return None
    kind, _, group = str(quant_type).partition("_g")
    if kind in ("int2", "int3", "int4") and group in ("32", "64", "128"):
        return int(kind[3:]), int(group)
    known = (*(kind.name for kind in GROUP_STORAGES), *MIXES)
    hint = " Leave out --calibrate." if quant_type in QUANT_TYPES else nearest_name(str(quant_type), known)
    raise ConfigError(
        f"--quant_type {quant_type!r} cannot be calibrated; expected intB_gG (B 2, 3, 4; G 32, 64, 128) or "
        f"{', '.join(MIXES)}.{hint}"
    )
