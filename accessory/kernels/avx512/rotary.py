"""Rotary embedding (Su et al. 2021) in bf16: a token's heads rotated in fp32, read and written once."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.operands import address, contiguous


def takes(dtype: torch.dtype) -> bool:
    """Whether rotations in `dtype` are read."""
    return dtype == torch.complex64


def rotate(x: Tensor, rotations: Tensor, layout: Literal["pairs", "halves"] = "pairs") -> Tensor:
    """As `accessory.kernels.plain.rotary.rotate`, of x in bf16 by rotations in complex64."""
    if layout not in ("pairs", "halves"):
        raise AssertionError(f"layout {layout!r}; known: pairs, halves")
    tokens, heads, width = x.shape
    half, back = rotations.shape[-1], rotations.is_conj()
    if 2 * half > width:
        raise AssertionError(f"rotations are of {2 * half} channels; heads have {width}")
    angles = contiguous(rotations.conj() if back else rotations, (tokens, 1, half), "rotations", torch.complex64)
    x = contiguous(x, x.shape, "x")
    y = torch.empty_like(x)
    compiled("rotate", "pppnnnnbfn")(
        *map(address, (x, angles, y)), tokens, heads, width, half, layout == "pairs", -1.0 if back else 1.0,
        torch.get_num_threads(),
    )  # fmt: skip
    return y
