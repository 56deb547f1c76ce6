"""The SwiGLU feed-forward layer (Shazeer 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.linear import Linear
from accessory.parallel.tensor import copy_to_model_parallel_region


class FeedForward(nn.Module):
    """x [T, D] -> w2(silu(w1 x) * w3 x) [T, D], the width F shared out over the ranks."""

    def __init__(self, args: ModelArgs, ranks: int, **linear) -> None:
        super().__init__()
        common = {"ranks": ranks, "bias": args.mlp_bias, **linear}
        self.w1 = Linear(args.dim, args.hidden_dim, cut="column", **common)
        self.w2 = Linear(args.hidden_dim, args.dim, cut="row", **common)
        self.w3 = Linear(args.dim, args.hidden_dim, cut="column", **common)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, D] -> [T, D]."""
        x = copy_to_model_parallel_region(x)
        return self.w2(swiglu(self.w1(x), self.w3(x)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; the backward recomputes silu rather than keeping it."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), dup
