"""Rotary embedding (Su et al. 2021) in bf16: a token's heads turned in fp32, read and written once."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.avx512.operands import address, whole


def rotate(x: Tensor, turn: Tensor, layout: Literal["pairs", "halves"] = "pairs") -> Tensor:
    """Queries or keys x [T, heads, E] turned by `turn` complex64 [T, 1, R / 2]; the result has x's dtype.

    The first R channels of a head turn, neighbours together ("pairs") or channel i with i + R / 2 ("halves"); the rest
    pass through. A conjugate `turn` turns back.
    """
    if layout not in ("pairs", "halves"):
        raise AssertionError(f"layout {layout!r}; known: pairs, halves")
    tokens, heads, width = x.shape
    half, direction = turn.shape[-1], -1.0 if turn.is_conj() else 1.0
    if 2 * half > width:
        raise AssertionError(f"turn is of {2 * half} channels; heads have {width}")
    angles = whole(turn.conj() if turn.is_conj() else turn, (tokens, 1, half), "turn", torch.complex64)
    x = whole(x, x.shape, "x")
    y = torch.empty_like(x)
    compiled("rotate", "pppnnnnbfn")(
        *map(address, (x, angles, y)), tokens, heads, width, half, layout == "pairs", direction, torch.get_num_threads()
    )
    return y
