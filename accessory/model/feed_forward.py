"""The feed-forward layer: gated (Shazeer 2020), or an activation between two matrices."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from accessory import kernels
from accessory.kernels.plain.gate import ACTIVATIONS
from accessory.model.args import ModelArgs
from accessory.model.backward_rows import rows_to_keep, spread
from accessory.model.decoding import decodes
from accessory.model.linear import Linear, project_columns
from accessory.model.recomputable import Recomputable


class FeedForward(nn.Module):
    """x [T, D] -> w2(act(w1 x) * w3 x) [T, D], or w2(act(w1 x)) without a w3; F is divided over the ranks."""

    def __init__(self, args: ModelArgs, ranks: int, **linear) -> None:
        super().__init__()
        self.activation = args.activation
        common = {"ranks": ranks, "bias": args.mlp_bias, **linear}
        self.w1 = Linear(args.dim, args.hidden_dim, cut="column", **common)
        self.w2 = Linear(args.hidden_dim, args.dim, cut="row", **common)
        self.gated = args.gated
        if self.gated:
            self.w3 = Linear(args.dim, args.hidden_dim, cut="column", **common)

    def linears_by_input(self) -> list[list[Linear]]:
        """The linears, those that share an input together."""
        return [[self.w1, self.w3] if self.gated else [self.w1], [self.w2]]

    def forward(self, x: Tensor | Recomputable) -> Tensor:
        """x [T, D] -> [T, D]."""
        if self.gated:
            return self.w2(gate(*project_columns(x, [self.w1, self.w3]), self.activation))
        return self.w2(activate(*project_columns(x, [self.w1]), self.activation))


def activate(x: Tensor, activation: str) -> Recomputable:
    """act(x), elementwise, of a linear's new output. ReLU overwrites x: its backward needs only its result."""
    if activation == "relu":
        return Recomputable.of(x.relu_())
    function = ACTIVATIONS[activation]
    return Recomputable(function(x), (x.detach(),), function)


def gate(x: Tensor, up: Tensor, activation: str = "silu") -> Recomputable:
    """act(x) * up, elementwise; neither it nor act(x) is saved."""
    if decodes():
        return Recomputable.of(_gated(activation, x, up))
    rows, kept = rows_to_keep(x), (x.detach(), up.detach())
    kept = kept if rows is None else tuple(tensor[rows] for tensor in kept)
    y = _Gate.apply(x, up, activation, rows, *kept)
    return Recomputable(y, kept, partial(_gated, activation), rows is not None)


def _gated(activation: str, x: Tensor, up: Tensor) -> Tensor:
    return kernels.of("gate", x, activation).forward(x, up, activation)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, activation: str, rows: Tensor | None, *kept: Tensor) -> Tensor:
        """x and up [T, F] -> activation(x) * up [T, F], in their dtype.

        kept: both, or their `rows`, which alone have a gradient then.
        """
        ctx.save_for_backward(*kept)
        ctx.activation, ctx.rows = activation, rows
        return _gated(activation, x, up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """dy [T, F] -> gradients of x and up [T, F]."""
        x, up = ctx.saved_tensors
        rows, length = ctx.rows, len(dy)
        dy = dy if rows is None else dy[rows]
        gradients = kernels.of("gate", x, ctx.activation).backward(dy, x, up, ctx.activation)
        if rows is not None:
            gradients = (spread(gradient, rows, length) for gradient in gradients)
        return *gradients, None, None, None, None
