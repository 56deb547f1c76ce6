"""Attention of new tokens to a key/value cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    q: Tensor, keys: Tensor, values: Tensor, counts: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """q [T, H, E] of each document's last tokens, equally many; keys and values [B, longest, K, E] -> [T, H, E].

    counts: how many keys each document has. window: how many of them, up to its own, a query sees; all if absent.
    One document after the other: no padding is read, and each gets the result that it gets alone.
    """
    parts = [
        _attend_document(part, keys[i, :count], values[i, :count], window, scale)
        for i, (part, count) in enumerate(zip(q.split((len(q) // len(counts),) * len(counts)), counts, strict=True))
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend_document(q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
    """The last tokens' queries [S, H, E] of one document, keys and values [n, K, E] of all -> [S, H, E]."""
    first = 0 if window is None else max(len(keys) - len(q) - window + 1, 0)
    keys, values = (t[first:].transpose(0, 1)[None] for t in (keys, values))
    if len(q) == 1:  # it sees all keys: heads that share them become rows of one head, in a fifth of the time
        rows = q.view(1, keys.shape[1], -1, q.shape[-1])
        return F.scaled_dot_product_attention(rows, keys, values, scale=scale).view(q.shape)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, attn_mask=_seen(len(q), keys.shape[2], window, q.device),
        scale=scale, enable_gqa=q.shape[1] != keys.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


def _seen(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which of `keys` keys each of the `queries` last tokens sees, bool [queries, keys]."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)
