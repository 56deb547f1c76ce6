"""Attention of one new token a document to the cache, from the linears' result to the input of `wo`, step by step."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.decoding import Attending
from accessory.kernels.plain.rms_norm import normalized
from accessory.kernels.plain.rotary import rotate


class Scratch:
    """Needs nothing: plain PyTorch allocates as it goes."""

    def __init__(self, how: Attending, rows: int, longest: int, device: torch.device) -> None:
        pass


def attend(
    how: Attending, projected: Tensor, keys: Tensor, values: Tensor, positions: Tensor, span: int, scratch: Scratch
) -> tuple[Tensor, Tensor | None]:
    """As `accessory.kernels.triton.decoding_attention.attend`; low products in a single part."""
    rows, (heads, kv_heads, width) = len(projected), how[:3]
    q, k, v = projected.view(rows, -1, width).split([heads, kv_heads, kv_heads], 1)
    if how.norms is not None:
        q, k = (normalized(x, weight, how.eps) for x, weight in zip((q, k), how.norms, strict=True))
    if how.rotations.shape[-1]:
        q, k = (rotate(x, how.rotations[positions][:, None], how.layout) for x in (q, k))
    each = torch.arange(rows, device=q.device)
    if how.beyond is not None:
        more = how.beyond[positions][:, None].expand(-1, kv_heads, -1)
        k, v = torch.cat([k, more], -1), torch.cat([v, torch.zeros_like(more)], -1)
    keys[each, positions], values[each, positions] = k, v
    tokens = torch.arange(span, device=q.device)
    seen = tokens <= positions[:, None]
    if how.window is not None:
        seen &= tokens > positions[:, None] - how.window
    rows_of_q = q.float().view(rows, kv_heads, -1, width)
    score = torch.einsum("bkge,btke->bkgt", rows_of_q, keys[:rows, :span, :, :width].float()) * how.scale
    if how.slopes is not None:
        distance = positions[:, None, None, None] - tokens
        score = score - how.slopes.view(kv_heads, -1, 1) * distance
    weight = score.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    out = torch.einsum("bkgt,btke->bkge", weight, values[:rows, :span, :, :width].float()).reshape(rows, -1).to(q.dtype)
    return out, None if how.following is None else (out.float() @ how.following.float().t())[:, None]
