"""The feed-forward layer: gated (Shazeer 2020), or an activation between two matrices."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from accessory import kernels
from accessory.kernels.plain.gate import ACTIVATIONS
from accessory.model.args import ModelArgs
from accessory.model.decoding import decodes
from accessory.model.linear import Linear, project_columns
from accessory.model.recomputed import Recomputed


class FeedForward(nn.Module):
    """x [T, D] -> w2(act(w1 x) * w3 x) [T, D], or w2(act(w1 x)) without a w3; the width F shared out over the ranks."""

    def __init__(self, args: ModelArgs, ranks: int, **linear) -> None:
        super().__init__()
        self.activation = args.activation
        common = {"ranks": ranks, "bias": args.mlp_bias, **linear}
        self.w1 = Linear(args.dim, args.hidden_dim, cut="column", **common)
        self.w2 = Linear(args.hidden_dim, args.dim, cut="row", **common)
        self.gated = args.gated
        if self.gated:
            self.w3 = Linear(args.dim, args.hidden_dim, cut="column", **common)

    def called_together(self) -> list[list[Linear]]:
        """The linears that share an input, and those that do not."""
        return [[self.w1, self.w3] if self.gated else [self.w1], [self.w2]]

    def forward(self, x: Tensor | Recomputed) -> Tensor:
        """x [T, D] -> [T, D]."""
        if self.gated:
            return self.w2(gate(*project_columns(x, [self.w1, self.w3]), self.activation))
        return self.w2(activate(*project_columns(x, [self.w1]), self.activation))


def activate(x: Tensor, activation: str) -> Recomputed:
    """act(x), elementwise, of a linear's fresh output. ReLU overwrites it: its backward needs only its result."""
    if activation == "relu":
        return Recomputed.of(x.relu_())
    function = ACTIVATIONS[activation]
    return Recomputed(function(x), (x.detach(),), function)


def gate(x: Tensor, up: Tensor, activation: str = "silu") -> Recomputed:
    """act(x) * up, elementwise; nobody keeps it nor act(x)."""
    if decodes():
        return Recomputed.of(_gated(activation, x, up))
    return Recomputed(_Gate.apply(x, up, activation), (x.detach(), up.detach()), partial(_gated, activation))


def _gated(activation: str, x: Tensor, up: Tensor) -> Tensor:
    return kernels.of("gate", x, activation).forward(x, up, activation)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x, up)
        ctx.activation = activation
        return _gated(activation, x, up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, up = ctx.saved_tensors
        return *kernels.of("gate", x, ctx.activation).backward(dy, x, up, ctx.activation), None
