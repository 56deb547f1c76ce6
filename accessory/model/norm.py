"""RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), saving their input and one or two numbers a token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor, nn

from accessory import kernels
from accessory.model.args import ModelArgs
from accessory.model.backward_rows import rows_to_keep, spread
from accessory.model.decoding import decodes
from accessory.model.recomputable import Recomputable


class Norm(nn.Module, ABC):
    """x [..., D] -> x normalized over D, computed in fp32 and returned in x's dtype. `weight` [D] is always fp32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return self.recomputable(x).value

    @abstractmethod
    def recomputable(self, x: Tensor) -> Recomputable:
        """The same, for readers that would otherwise save it."""


class RMSNorm(Norm):
    """x / rms(x) * weight."""

    def recomputable(self, x: Tensor) -> Recomputable:
        """The result, and how to recompute it from what the norm saves."""
        if decodes():
            return Recomputable.of(kernels.of("rms_norm", x).normalized(x, self.weight, self.eps))
        rows = None if self.weight.requires_grad else rows_to_keep(x)
        kept = x.detach() if rows is None else x.detach()[rows]
        y, scale = _RMSNorm.apply(x, self.weight, self.eps, kept, rows)
        return Recomputable(y, (kept, scale, self.weight), _recompute, rows is not None)


class LayerNorm(Norm):
    """(x - mean(x)) / deviation(x) * weight + bias; `bias` [D] is fp32 too."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.bias = nn.Parameter(torch.empty(dim, dtype=torch.float32, device="meta"))

    def recomputable(self, x: Tensor) -> Recomputable:
        """The result, and how to recompute it from the input, which the norm saves."""
        y = _LayerNorm.apply(x, self.weight, self.bias, self.eps)
        return Recomputable(y, (x.detach(), self.weight, self.bias), partial(_layer_norm, eps=self.eps))


def make_norm(args: ModelArgs, dim: int) -> Norm:
    """The kind of norm that the settings ask for, over `dim` channels."""
    return (LayerNorm if args.norm == "layer" else RMSNorm)(dim, args.norm_eps)


def _recompute(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    return kernels.of("rms_norm", x).recompute(x, weight, scale)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, kept: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [..., D], weight [D] -> y, as x is, and what each row was multiplied by, fp32, for the backward.

        kept: x, or its `rows`, which alone have a gradient then; of the factors these alone are given, too.
        """
        y, scale = kernels.of("rms_norm", x).forward(x, weight, eps)
        scale = scale if rows is None else scale[rows]
        ctx.save_for_backward(kept, weight, scale)
        ctx.rows = rows
        ctx.mark_non_differentiable(scale)
        ctx.set_materialize_grads(False)  # making zeros for the scale's gradient would cost a launch
        return y, scale

    @staticmethod
    def backward(ctx, dy: Tensor | None, _dscale: None) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """dy [..., D] -> gradients of x and weight in their dtypes, those that are wanted."""
        if dy is None:  # nothing read y
            return (None,) * 5
        saved, rows, length = ctx.saved_tensors, ctx.rows, len(dy)
        need_dx, need_dweight = ctx.needs_input_grad[:2]
        dy = dy if rows is None else dy[rows]
        kernel = kernels.of("rms_norm", dy)
        dx, dweight = kernel.backward(dy, *saved, need_dx=need_dx, need_dweight=need_dweight)
        return dx if dx is None or rows is None else spread(dx, rows, length), dweight, None, None, None


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _layer_norm_and_statistics(x, weight, bias, eps)[0]


def _layer_norm_and_statistics(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y, mean, inverse = torch.native_layer_norm(wide, weight.shape, weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return y.to(x.dtype), mean, inverse


class _LayerNorm(torch.autograd.Function):
    """torch's kernels (one dtype on CUDA) on an fp32 copy of x, which torch's own function would save."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """x [..., D], weight and bias [D] -> y, as x is."""
        y, mean, inverse = _layer_norm_and_statistics(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """dy [..., D] -> gradients of x, weight and bias in their dtypes, those that are wanted."""
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
