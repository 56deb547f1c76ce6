"""RMSNorm (Zhang & Sennrich 2019) in bf16: one pass over memory in each direction, fp32 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.operands import address, contiguous, made

CHUNK = 64  # rows of one partial sum of the weight's gradient


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] and weight [D] -> x / rms(x) * weight in x's dtype, for no gradient."""
    return forward(x, weight, eps)[0]


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The same, and 1 / rms(x) fp32 [..., 1]."""
    scale = made((*x.shape[:-1], 1), torch.float32)
    return _forward(x, weight, scale, eps, known=False), scale


def recompute(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The forward's result, bit by bit, from the scale that it returned."""
    return _forward(x, weight, _scale_of(x, scale), 0.0, known=True)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, need_dx: bool = True, need_dweight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dx in x's dtype and dweight in weight's, None where not needed; `scale` [..., 1] is the forward's."""
    dy, x = contiguous(dy, x.shape, "dy"), contiguous(x, x.shape, "x")
    scale, wide = _scale_of(x, scale), _wide(weight, x)
    rows, width = scale.numel(), x.shape[-1]
    dx = made(x.shape) if need_dx else None
    sums = made((-(-rows // CHUNK), width), torch.float32).zero_() if need_dweight else None
    compiled("rms_norm_backward", "ppppppnnnn")(
        *map(address, (dy, x, wide, scale, dx, sums)), rows, width, CHUNK, torch.get_num_threads()
    )
    return dx, None if sums is None else sums.sum(0).to(weight.dtype)


def _forward(x: Tensor, weight: Tensor, scale: Tensor, eps: float, *, known: bool) -> Tensor:
    x, wide = contiguous(x, x.shape, "x"), _wide(weight, x)
    y = torch.empty_like(x)
    compiled("rms_norm_forward", "ppppnnfbn")(
        *map(address, (x, wide, y, scale)), scale.numel(), x.shape[-1], eps, known, torch.get_num_threads()
    )
    return y


def _wide(weight: Tensor, x: Tensor) -> Tensor:
    return contiguous(weight.to(torch.float32), x.shape[-1:], "weight", torch.float32)


def _scale_of(x: Tensor, scale: Tensor) -> Tensor:
    return contiguous(scale, (*x.shape[:-1], 1), "scale", torch.float32)
