"""Products of a few rows with matrices of 2, 3 and 4-bit numbers in groups, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.codes import GroupCodes
from accessory.kernels.plain.group_codes import dequantize


def multiply(
    matrices: list[GroupCodes],
    x: Tensor,
    low: Tensor | None = None,
    b: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As `accessory.kernels.triton.decoding_groups.multiply`."""
    widths = [w.shape[0] for w in matrices]
    made = [x.float() @ dequantize(w, torch.empty(w.shape, device=x.device)).t() for w in matrices]
    if b is not None:
        lows, factors = low.split(b.shape[1], 1), b.float().split(widths)
        made = [y + part @ factor.t() for y, part, factor in zip(made, lows, factors, strict=False)]
    if bias is not None:
        made = [y + part for y, part in zip(made, bias.split(widths), strict=True)]
    return tuple(y.to(x.dtype) for y in made)
