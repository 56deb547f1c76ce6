"""RMSNorm (Zhang & Sennrich 2019) and its gradients, in fp32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.torch_compile import fusible


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] and weight [D] -> x / rms(x) * weight in x's dtype, for no gradient."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, and 1 / rms(x) [..., 1] in fp32 at least."""
    scale = _inverse_rms(x, eps)
    return recompute(x, weight, scale), scale


@fusible
def recompute(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The forward's result, bit by bit, from the scale that it returned."""
    return (x.to(scale.dtype) * scale).mul_(weight).to(x.dtype)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, need_dx: bool = True, need_dweight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dx in x's dtype and dweight in weight's, None where not needed; `scale` [..., 1] is the forward's."""
    if need_dx and need_dweight:
        return _both_gradients(dy, x, weight, scale)
    dx = _input_gradient(dy, x, weight, scale) if need_dx else None
    return dx, _weight_gradient(dy, x, weight, scale) if need_dweight else None


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
