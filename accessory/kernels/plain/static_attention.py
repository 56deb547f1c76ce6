"""Attention of one new token a document to a key/value cache, in shapes that do not depend on the documents."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [B, H, E] of a token each; keys and values [B, longest, K, E] -> [B, H, E].

    mask: added to the scores of the first `span` keys [B, span], in q's dtype; the other keys are not read.
    """
    documents, span = mask.shape
    keys, values = (cached[:documents, :span].transpose(1, 2) for cached in (keys, values))
    rows = q.view(documents, keys.shape[1], -1, q.shape[-1])  # heads that share keys become rows of one head
    added = mask[:, None, None].expand(-1, keys.shape[1], rows.shape[2], -1)
    return F.scaled_dot_product_attention(rows, keys, values, attn_mask=added, scale=scale).view(q.shape)
