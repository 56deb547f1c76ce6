"""RMSNorm (Zhang & Sennrich 2019), saving its input and one number a token for the backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x [T, D] -> x / rms(x) * weight, computed in fp32 and returned in x's dtype. `weight` [D] is always fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x.to(scale.dtype) * scale
        dy = dy.to(scale.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * unit).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dunit = dy * weight
            dx = dunit.sub_(unit.mul_((dunit * unit).mean(-1, keepdim=True))).mul_(scale).to(x.dtype)
        return dx, dweight, None
