"""RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), saving their input and a number or two a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import kernels
from accessory.kernels.torch_compile import fusible
from accessory.model.args import ModelArgs
from accessory.model.decoding import decodes
from accessory.model.recomputed import Recomputed


class Norm(nn.Module, ABC):
    """x [..., D] -> x normalized over D, computed in fp32 and returned in x's dtype. `weight` [D] is always fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return self.recomputed(x).value

    @abstractmethod
    def recomputed(self, x: Tensor) -> Recomputed:
        """The same, for readers that would keep it."""


class RMSNorm(Norm):
    """x / rms(x) * weight."""

    def recomputed(self, x: Tensor) -> Recomputed:
        """The result, and that it is x times two things that the norm keeps."""
        if decodes():
            if kernel := kernels.chosen("rms_norm", x.device, x.dtype):
                return Recomputed.of(kernel.forward(x, self.weight, self.eps)[0])
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return Recomputed.of(F.rms_norm(wide, self.weight.shape, self.weight.to(wide.dtype), self.eps).to(x.dtype))
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
    if kernel := kernels.chosen("rms_norm", x.device, x.dtype):
        return kernel.again(x, weight, scale)
    return _plainly_scaled(x, scale, weight)


@fusible
def _plainly_scaled(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return (x.to(scale.dtype) * scale).mul_(weight).to(x.dtype)


@fusible
def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))


@fusible
def _input_gradient(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    unit = x.to(scale.dtype) * scale
    dunit = dy.to(scale.dtype) * weight
    return dunit.sub_(unit.mul_((dunit * unit).mean(-1, keepdim=True))).mul_(scale).to(x.dtype)


@fusible
def _weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return (dy.to(scale.dtype) * (x.to(scale.dtype) * scale)).flatten(0, -2).sum(0).to(weight.dtype)


@fusible
def _both_gradients(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    unit, wide = x.to(scale.dtype) * scale, dy.to(scale.dtype)
    terms = wide * unit  # of both sums
    along = (terms @ weight.to(terms.dtype)).div_(x.shape[-1])[..., None]
    dx = (wide * weight).sub_(unit.mul_(along)).mul_(scale).to(x.dtype)
    return dx, terms.flatten(0, -2).sum(0).to(weight.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result, and 1 / rms(x) [..., 1]."""
    if kernel := kernels.chosen("rms_norm", x.device, x.dtype):
        return kernel.forward(x, weight, eps)
    scale = _inverse_rms(x, eps)
    return _plainly_scaled(x, scale, weight), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return y, scale

    @staticmethod
    def backward(ctx, dy: Tensor, _dscale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = ctx.saved_tensors
        need_dx, need_dweight, _ = ctx.needs_input_grad
        if kernel := kernels.chosen("rms_norm", dy.device, dy.dtype):
            return *kernel.backward(dy, *saved, need_dx=need_dx, need_dweight=need_dweight), None
        if need_dx and need_dweight:
            return *_both_gradients(dy, *saved), None
        dx = _input_gradient(dy, *saved) if need_dx else None
        return dx, _weight_gradient(dy, *saved) if need_dweight else None, None


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
