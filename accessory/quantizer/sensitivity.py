"""How much worse the model gets where a linear has two bits instead of four.

What a linear's error costs is the sum over its outputs n of E[g_n^2] * dW_n H dW_n^T: g is the gradient of the loss by
the output, H the second moments of the inputs, dW what the grid makes of W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from accessory.model.block import Block
from accessory.model.loss import cross_entropy_sum
from accessory.model.sequences import Sequences
from accessory.parallel.allocator import give_back_freed_memory
from accessory.quantizer.blocks import Blocks, batches, by_input, linears, replace_weight
from accessory.quantizer.folder import Folder
from accessory.quantizer.gptq import DAMPING, output_error
from accessory.quantizer.grid import Grid, fit, nearest, pieces
from accessory.quantizer.reconstruction import summed
from accessory.quantizer.states import States
from accessory.quantizer.strategy import NARROW, WIDE, Gain
from accessory.quantizer.weights import Moments, WatchedWeight

_INPUTS, _GRADIENTS, _FOUND = "inputs", "gradients", "sensitivity.json"


def measure(blocks: Blocks, ids: Tensor, batch: int, folder: Folder, say: Callable[[str], None]) -> dict[str, Gain]:
    """The gains of all linears by full name, the last block's first. A collective: each rank has rows of its own.

    One forward and one backward, a block at a time, `batch` rows at a time; what lies between blocks is in files of
    `folder`, and so are the gains so far, with which it goes on. ids: rows [R, S] on the CPU.
    """
    found = {name: Gain(*gain) for name, gain in (folder.read_json(_FOUND) or {}).items()}
    left = len(blocks) - len({name.split(".")[1] for name in found})
    states = _States(blocks, ids, batch, folder)
    if left == len(blocks):
        _forward(states)
    for index in reversed(range(left)):
        found |= _gains_of(states, index)
        folder.record(_FOUND, found)
        states.of(_INPUTS, index + 1).path.unlink(missing_ok=True)
        states.of(_GRADIENTS, index + 1).path.unlink()
        give_back_freed_memory()
        say(f"sensitivity of block {len(blocks) - index:3}/{len(blocks)}")
    if left:
        for kind in (_INPUTS, _GRADIENTS):
            states.of(kind, 0).path.unlink()
    return found


class _States:
    """The rows, and files of what lies before each block: its inputs, and the gradients by them."""

    def __init__(self, blocks: Blocks, ids: Tensor, batch: int, folder: Folder) -> None:
        self.blocks, self.ids, self.batch, self.folder = blocks, ids, batch, folder
        self.device, self.group = blocks.layout.device, folder.group

    def of(self, kind: str, index: int) -> States:
        """The file of one kind before block number `index`."""
        shape = (*self.ids.shape, self.blocks.args.dim)
        return States(self.folder.states(kind, index), shape, self.blocks.dtype)

    def parts(self) -> Iterator[tuple[list[int], Sequences]]:
        """Numbers of some rows at a time, and where their tokens stand."""
        for rows in batches(len(self.ids), self.batch):
            yield rows, self.blocks.sequences(len(rows), self.ids.shape[1])

    def read(self, kind: str, index: int, rows: list[int]) -> Tensor:
        """What it has of some rows, [T, D]."""
        return self.of(kind, index).read(rows).to(self.device)


def _forward(states: _States) -> None:
    """Write the inputs of all blocks, and the gradients by the last one's outputs."""
    blocks, last = states.blocks, len(states.blocks)
    with torch.no_grad():
        entered = (
            blocks.decoder.enter(states.ids[rows].flatten().to(states.device), where) for rows, where in states.parts()
        )
        states.of(_INPUTS, 0).write(entered)
        for index in range(last):
            block = blocks.load(index)
            outputs = (block(states.read(_INPUTS, index, rows), where) for rows, where in states.parts())
            states.of(_INPUTS, index + 1).write(outputs)
    gradients = (
        _loss_gradient(blocks, states.read(_INPUTS, last, rows), states.ids[rows]) for rows, _ in states.parts()
    )
    states.of(_GRADIENTS, last).write(gradients)


def _gains_of(states: _States, index: int) -> dict[str, Gain]:
    """The gains of a block's linears; writes the gradients by the block's inputs."""
    block = states.blocks.load(index)
    watched = watch(block)
    gradients = (
        _through(block, states.read(_INPUTS, index, rows), where, states.read(_GRADIENTS, index + 1, rows))
        for rows, where in states.parts()
    )
    states.of(_GRADIENTS, index).write(gradients)
    summed((w.moments.inputs for w in watched.values() if w.moments.inputs is not None), states.group)
    summed((w.moments.gradients for w in watched.values()), states.group)
    return {
        f"layers.{index}.{name}": Gain(_gain(weight.codes.detach(), weight.moments), weight.codes.numel())
        for name, weight in watched.items()
    }


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
    costs = [0.0, 0.0]
    for part in pieces(*weight.shape):
        w = weight[part].float()
        for number, width in enumerate((NARROW, WIDE)):
            difference = rounded(w, importance, *width).weights().sub_(w)
            costs[number] += float((moments.gradients[part] * output_error(difference, hessian)).sum())
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
