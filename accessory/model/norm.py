"""RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), saving their input and a number or two a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor, nn

from accessory import kernels
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
            return Recomputed.of(kernels.of("rms_norm", x).normalized(x, self.weight, self.eps))
        y, scale = _RMSNorm.apply(x, self.weight, self.eps)
        return Recomputed(y, (x.detach(), scale, self.weight), _again)


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


def _again(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return kernels.of("rms_norm", x).again(x, weight, scale)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, scale = kernels.of("rms_norm", x).forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.mark_non_differentiable(scale)
        return y, scale

    @staticmethod
    def backward(ctx, dy: Tensor, _dscale: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        saved = ctx.saved_tensors
        need_dx, need_dweight, _ = ctx.needs_input_grad
        kernel = kernels.of("rms_norm", dy)
        return *kernel.backward(dy, *saved, need_dx=need_dx, need_dweight=need_dweight), None


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
