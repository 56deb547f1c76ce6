"""RMSNorm (Zhang & Sennrich 2019) in bf16: one pass over memory in each direction, fp32 inside."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled

CHUNK = 64  # rows whose share in the weight's gradient is one sum


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D] and weight [D] -> x / rms(x) * weight in x's dtype, and 1 / rms(x) fp32 [..., 1]."""
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
    return _forward(x, weight, scale, eps, known=False), scale


def again(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The forward's result, bit by bit, from the scale that it returned."""
    return _forward(x, weight, scale, 0.0, known=True)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, *, need_dx: bool = True, need_dweight: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    """dx in x's dtype and dweight in weight's, None where not needed; `scale` [..., 1] is the forward's."""
    dy, x, wide = dy.contiguous(), x.contiguous(), weight.to(torch.float32).contiguous()
    rows, width = scale.numel(), len(weight)
    dx = torch.empty_like(x) if need_dx else None
    sums = torch.zeros(-(-rows // CHUNK), width) if need_dweight else None
    compiled("rms_norm_backward", "ppppppnnnn")(
        dy.data_ptr(), x.data_ptr(), wide.data_ptr(), scale.data_ptr(), None if dx is None else dx.data_ptr(),
        None if sums is None else sums.data_ptr(), rows, width, CHUNK, torch.get_num_threads(),
    )  # fmt: skip
    return dx, None if sums is None else sums.sum(0).to(weight.dtype)


def _forward(x: Tensor, weight: Tensor, scale: Tensor, eps: float, *, known: bool) -> Tensor:
    x, wide = x.contiguous(), weight.to(torch.float32).contiguous()
    y = torch.empty_like(x)
    compiled("rms_norm_forward", "ppppnnfbn")(
        x.data_ptr(), wide.data_ptr(), y.data_ptr(), scale.data_ptr(), scale.numel(), len(weight), eps, known,
        torch.get_num_threads(),
    )  # fmt: skip
    return y
