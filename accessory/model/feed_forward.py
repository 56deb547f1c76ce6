"""The feed-forward layer: gated (Shazeer 2020), or an activation between two matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.linear import Linear
from accessory.parallel.tensor import copy_to_model_parallel_region

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (dy, x) -> dx
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
}


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

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        x = copy_to_model_parallel_region(x)
        if self.gated:
            return self.w2(gate(self.w1(x), self.w3(x), self.activation))
        return self.w2(activate(self.w1(x), self.activation))


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x), elementwise, of a linear's fresh output. ReLU overwrites it: its backward needs only its result."""
    return x.relu_() if activation == "relu" else ACTIVATIONS[activation](x)


def gate(x: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(x) * up, elementwise; the backward recomputes act rather than keeping it."""
    return _Gate.apply(x, up, activation)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x, up)
        ctx.activation = activation
        return ACTIVATIONS[activation](x).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, up = ctx.saved_tensors
        dup = ACTIVATIONS[ctx.activation](x).mul_(dy)
        return _GRADIENTS[ctx.activation](dy * up, x), dup, None
