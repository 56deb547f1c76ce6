"""One block of the model at a time, read from the checkpoint, and run over rows of calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from accessory.checkpoint.load import fill_module
from accessory.checkpoint.naming import Tensors
from accessory.model.args import ModelArgs
from accessory.model.block import Block
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.model.sequences import Sequences
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight


class Blocks:
    """The model's ends in memory, and its blocks when they are asked for: `tensors` are by our names, unread."""

    def __init__(self, args: ModelArgs, tensors: Tensors, dtype: torch.dtype, layout: Layout) -> None:
        self.args, self.tensors, self.dtype, self.layout = args, tensors, dtype, layout
        self.decoder = Decoder(args, dtype=dtype)
        self.decoder.place(layout.device)
        for name, child in self.decoder.named_children():
            if name != "layers":
                fill_module(child, name, tensors, layout)
        self.decoder.eval()

    def __len__(self) -> int:
        return self.args.n_layers

    def load(self, index: int) -> Block:
        """A block with the weights in the checkpoint, frozen; it is the caller's alone."""
        block = Block(self.args, index, 1, dtype=self.dtype)
        fill_module(block, f"layers.{index}", self.tensors, self.layout)
        return block.eval()

    def sequences(self, rows: int, length: int) -> Sequences:
        """So many documents of `length` tokens each."""
        return self.decoder.sequences((length,) * rows)


def linears(block: Block) -> dict[str, Linear]:
    """The linears of a block by their names in it, such as attention.wq."""
    return {name: module for name, module in block.named_modules() if isinstance(module, Linear)}


def by_input(block: Block) -> list[list[str]]:
    """The names of the linears of a block, those that share their input together."""
    names = {module: name for name, module in block.named_modules()}
    groups = (*block.attention.linears_by_input(), *block.feed_forward.linears_by_input())
    return [[names[linear] for linear in group] for group in groups]


def replace_weight(linear: Linear, weight: PackedWeight) -> None:
    """Have a linear multiply with another matrix of the same shape."""
    del linear.weight
    weight.slicing = linear.weight_slicing
    linear.weight = weight


def batches(rows: int, size: int) -> Iterator[list[int]]:
    """The numbers of `rows` rows in order, `size` at a time."""
    return (list(range(start, min(start + size, rows))) for start in range(0, rows, size))


@torch.no_grad()
def outputs(
    run: Callable[[Tensor, Sequences], Tensor], inputs: Iterator[Tensor], blocks: Blocks, length: int
) -> Iterator[Tensor]:
    """Batches of inputs [T, D], on any device -> what `run` makes of each [T, D]."""
    for x in inputs:
        yield run(x.to(blocks.layout.device), blocks.sequences(len(x) // length, length))
