"""Quantizes one block: error feedback, then reconstruction, from files of hidden states to a file of packed parts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from accessory.model.block import Block
from accessory.model.linear import Linear
from accessory.parallel.allocator import give_back_freed_memory
from accessory.parallel.groups import Layout
from accessory.quant.groups import GroupWeight, group_storage, packed_codes
from accessory.quant.packed import PackedState
from accessory.quantizer.blocks import Blocks, batches, by_input, linears, replace_weight
from accessory.quantizer.gptq import curvature, damp_, gptq, output_error
from accessory.quantizer.grid import Grid
from accessory.quantizer.reconstruction import relative_error, summed, train_block
from accessory.quantizer.sensitivity import watch
from accessory.quantizer.settings import Settings
from accessory.quantizer.states import States
from accessory.quantizer.strategy import Width
from accessory.quantizer.weights import LatentWeight, WatchedWeight, latent_weight

FORWARD = 4
"""Rows that are run together where nothing is trained."""
_SHOWN = 8  # steps at a training's beginning and end whose mean loss is told

Packed = dict[str, tuple[type[GroupWeight], PackedState]]
"""Name of a linear in its block -> its storage and parts."""


class Rows:
    """This rank's rows of calibration text: token ids [R, S] on the CPU, the first `fitted` to fit to.

    The others are measured only. seed: of the orders in which rows are gone through.
    """

    def __init__(self, ids: Tensor, fitted: int, seed: int, layout: Layout, group: dist.ProcessGroup) -> None:
        self.ids, self.fitted, self.seed, self.layout, self.group = ids, fitted, seed, layout, group

    @property
    def held(self) -> list[int]:
        """The rows that are measured only."""
        return list(range(self.fitted, len(self.ids)))

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.ids.shape[1]

    def steps(self, epochs: int, batch: int, number: int) -> list[list[int]]:
        """The rows of each step of training number `number`: each epoch takes all that are fitted to, in a new order.

        batch: rows of a step over all ranks; those that stand together. So a step has the same rows on any number of
        ranks, of which each holds every so manyth row.
        """
        generator = torch.Generator().manual_seed(self.seed * 10007 + number)
        size, found = batch // self.layout.dp_size, []
        for _ in range(epochs):
            order = torch.randperm(self.fitted // size, generator=generator).tolist()
            found += [list(range(i * size, (i + 1) * size)) for i in order]
        return found

    def mean(self, value: Tensor) -> float:
        """The mean of a number over all ranks."""
        value = value.detach().float().to(self.layout.device, copy=True)
        summed([value], self.group)
        return float(value) / self.layout.dp_size


def quantize_block(
    blocks: Blocks,
    index: int,
    widths: dict[str, Width],
    rows: Rows,
    settings: Settings,
    full: tuple[States, States],
    packed: tuple[States, States],
) -> tuple[Packed, dict[str, Any]]:
    """Quantize a block to `widths`, by name in it; returns its parts and figures.

    full, packed: the model's states before and after the block; those before are read, the others are written.
    The allocator, which else keeps what is freed for the next step, gives it back between the stages.
    """
    begun, block = time.monotonic(), blocks.load(index)
    full[1].write(block_outputs(blocks, block, full[0], rows))
    watched = watch(block)
    for _ in block_outputs(blocks, block, packed[0], rows, rows.fitted):
        pass
    give_back_freed_memory()
    summed((weight.moments.inputs for weight in watched.values() if weight.moments.inputs is not None), rows.group)
    errors: dict[str, float] = {}
    for names in sorted(by_input(block), key=lambda names: -watched[names[0]].shape[1]):  # the largest H goes first
        errors |= _fit(block, {name: watched.pop(name) for name in names}, widths, settings.whole_points)
    latent = {name: linear.weight for name, linear in linears(block).items()}
    give_back_freed_memory()
    steps = rows.steps(settings.epochs, settings.batch, index)
    losses = _reconstruct(blocks, block, latent, rows, settings, (packed[0], full[1]), steps) if steps else []
    found: Packed = {}
    for name in [*latent]:
        found[name] = _packed(latent.pop(name).as_grid())
        _adopt(linears(block)[name], *found[name], blocks.layout.device)
    give_back_freed_memory()
    packed[1].write(block_outputs(blocks, block, packed[0], rows))
    figures = {
        "error": rows.mean(relative_error(packed[1].read(rows.held), full[1].read(rows.held))),
        "losses": [_mean(losses[:_SHOWN]), _mean(losses[-_SHOWN:])] if losses else [],
        "linears": errors,
        "seconds": time.monotonic() - begun,
    }
    return found, figures


@torch.no_grad()
def block_outputs(
    blocks: Blocks, block: Block, inputs: States, rows: Rows, first: int | None = None
) -> Iterator[Tensor]:
    """A block's outputs [T, D] for the first rows of its inputs, or all, some rows at a time."""
    for part in batches(len(rows.ids) if first is None else first, FORWARD):
        yield block(inputs.read(part).to(blocks.layout.device), blocks.sequences(len(part), rows.length))


def _fit(block: Block, watched: dict[str, WatchedWeight], widths: dict[str, Width], whole: bool) -> dict[str, float]:
    """Have linears that share their input multiply with their latent matrices, and forget the full ones.

    watched: by name, with the first one's moments; these are used up. whole: zero points are whole. Returns by name the
    squared error of the outputs, relative to these.
    """
    moments = watched[next(iter(watched))].moments
    hessian, moments.inputs = damp_(moments.inputs), None
    of_outputs = {name: float(output_error(weight.codes.detach(), hessian).sum()) for name, weight in watched.items()}
    of_inputs, errors = curvature(hessian), {}
    for name in [*watched]:
        grid, lost = gptq(watched.pop(name).codes.detach(), of_inputs, *widths[name], whole=whole)
        errors[name] = lost / of_outputs[name]
        replace_weight(linears(block)[name], latent_weight(grid))
    return errors


def _reconstruct(
    blocks: Blocks,
    block: Block,
    latent: dict[str, LatentWeight],
    rows: Rows,
    settings: Settings,
    states: tuple[States, States],
    steps: list[list[int]],
) -> list[float]:
    """Train the latent matrices of a block; returns the losses. states: its inputs, and the outputs it should give."""
    device = blocks.layout.device

    def run(part: list[int]) -> tuple[Tensor, Tensor]:
        """(found, wanted) outputs for some rows."""
        found = block(states[0].read(part).to(device), blocks.sequences(len(part), rows.length))
        return found, states[1].read(part).to(device)

    return train_block(block, list(latent.values()), run, steps, settings.rates, rows.group)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _packed(grid: Grid) -> tuple[type[GroupWeight], PackedState]:
    state = packed_codes(grid.codes.to(torch.uint8), grid.bits) | {"scales": grid.scales.half()}
    if grid.points is None:
        return group_storage(grid.bits, grid.group), state | {"zeros": grid.zeros.half()}
    return group_storage(grid.bits, grid.group, ("points",)), state | {"points": grid.points.to(torch.uint8)}


def _adopt(linear: Linear, kind: type[GroupWeight], state: PackedState, device: torch.device) -> None:
    """Have a linear multiply with its packed matrix."""
    weight = kind(tuple(linear.weight.shape))
    weight.adopt({part: value.to(device) for part, value in state.items()})
    replace_weight(linear, weight)
