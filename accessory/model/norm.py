"""RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), saving their input and a number or two a token."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.recomputed import Recomputed


class Norm(nn.Module):
    """x [..., D] -> x normalized over D, computed in fp32 and returned in x's dtype. `weight` [D] is always fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return self.recomputed(x).value

    def recomputed(self, x: Tensor) -> Recomputed:
        """The same, for readers that would keep it."""
        raise NotImplementedError


class RMSNorm(Norm):
    """x / rms(x) * weight."""

    def recomputed(self, x: Tensor) -> Recomputed:
        """The result, and that it is x times two things that the norm keeps."""
        y, scale = _RMSNorm.apply(x, self.weight, self.eps)
        return Recomputed(y, (x.detach(), scale, self.weight), _scaled)


class LayerNorm(Norm):
    """(x - mean(x)) / deviation(x) * weight + bias; `bias` [D] is fp32 too."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.empty(dim, dtype=torch.float32, device="meta"))

    def recomputed(self, x: Tensor) -> Recomputed:
        """The result, and how to make it again of the input, which the norm keeps."""
        y = _LayerNorm.apply(x, self.weight, self.bias, self.eps)
        return Recomputed(y, (x.detach(), self.weight, self.bias), partial(_layer_norm, eps=self.eps))


def make_norm(args: ModelArgs, dim: int) -> Norm:
    """The kind of norm that the settings ask for, over `dim` channels."""
    return (LayerNorm if args.norm == "layer" else RMSNorm)(dim, args.norm_eps)


def _scaled(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return (x.to(scale.dtype) * scale).mul_(weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return _scaled(x, scale, weight), scale

    @staticmethod
    def backward(ctx, dy: Tensor, _dscale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        unit = x.to(scale.dtype) * scale
        dy = dy.to(scale.dtype)
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (dy * unit).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            dunit = dy * weight
            dx = dunit.sub_(unit.mul_((dunit * unit).mean(-1, keepdim=True))).mul_(scale).to(x.dtype)
        return dx, dweight, None


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _layer_norm_and_statistics(x, weight, bias, eps)[0]


def _layer_norm_and_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y, mean, inverse = torch.native_layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return y.to(x.dtype), mean, inverse


class _LayerNorm(torch.autograd.Function):
    """torch's own kernels on a wide copy of x that is dropped again: they would keep it, and want one dtype on CUDA."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, inverse = _layer_norm_and_statistics(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy.to(mean.dtype), x.to(mean.dtype), weight.shape, mean, inverse,
            weight.to(mean.dtype), bias.to(mean.dtype), ctx.needs_input_grad[:3],
        )  # fmt: skip
        return (
            dx.to(x.dtype) if ctx.needs_input_grad[0] else None,
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            dbias.to(bias.dtype) if ctx.needs_input_grad[2] else None,
            None,
        )
