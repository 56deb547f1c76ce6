"""Rotary embedding (Su et al. 2021) in bf16: a token's heads turned in fp32, read and written once."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled


def rotate(x: Tensor, turn: Tensor, layout: Literal["pairs", "halves"] = "pairs") -> Tensor:
    """Queries or keys x [T, heads, E] turned by `turn` complex64 [T, 1, R / 2]; the result has x's dtype.

    The first R channels of a head turn, neighbours together ("pairs") or channel i with i + R / 2 ("halves"); the rest
    pass through. A conjugate `turn` turns back.
    """
    if layout not in ("pairs", "halves"):
        raise AssertionError(f"layout {layout!r}; known: pairs, halves")
    x, direction = x.contiguous(), -1.0 if turn.is_conj() else 1.0
    angles = (turn.conj() if turn.is_conj() else turn).contiguous()
    y = torch.empty_like(x)
    compiled("rotate", "pppnnnnbfn")(
        x.data_ptr(), angles.data_ptr(), y.data_ptr(), *x.shape, turn.shape[-1], layout == "pairs", direction,
        torch.get_num_threads(),
    )  # fmt: skip
    return y
