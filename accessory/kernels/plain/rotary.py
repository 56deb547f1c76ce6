"""Rotary embedding (Su et al. 2021), in fp32 at least."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from accessory.kernels.torch_compile import fusible

_CHUNK = 1 << 19  # values rotated at once on the CPU: their fp32 copies stay in its cache


def rotate(x: Tensor, rotations: Tensor, layout: Literal["pairs", "halves"] = "pairs") -> Tensor:
    """Rotate queries or keys x [T, heads, E] by unit complex numbers [T, 1, n]; the result has x's dtype.

    Only the first 2 n channels of a head are rotated: neighbours together ("pairs") or channel i with i + n
    ("halves"). The rest pass through. Conjugates rotate back.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width, formula = 2 * rotations.shape[-1], {"pairs": _rotate_pairs, "halves": _rotate_halves}[layout]
    rows = len(x) if x.is_cuda else _CHUNK // (x.shape[1] * x.shape[2])
    rows = max(rows, 1)
    for part, angles, place in zip(x.split(rows), rotations.split(rows), out.split(rows), strict=True):
        place[..., :width] = formula(part[..., :width], angles)
    if width < x.shape[-1]:
        out[..., width:] = x[..., width:]
    return out


def _rotate_pairs(x: Tensor, rotations: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.to(rotations.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    if x.is_cuda and rotations.is_conj():  # a product would copy it; dividing by numbers of length 1 need not
        return torch.view_as_real(pairs / rotations.conj()).flatten(-2)
    return torch.view_as_real(pairs * rotations).flatten(-2)


def _rotate_halves(x: Tensor, rotations: Tensor) -> Tensor:
    back = rotations.is_conj()
    cosine, sine = torch.view_as_real(rotations.conj() if back else rotations).unbind(-1)
    return _rotate_halves_by(x, cosine, sine, back)


@fusible
def _rotate_halves_by(x: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    # Over whole heads: faster than over halves one by one, or complex numbers.
    wide, sines = x.to(cosine.dtype), torch.cat([sine, -sine] if back else [-sine, sine], -1)
    return (wide * torch.cat([cosine, cosine], -1)).addcmul_(wide.roll(x.shape[-1] // 2, -1), sines)
