"""Grouped-query attention over packed documents, and over a key/value cache when generating."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.cache import LayerCache
from accessory.model.linear import Linear
from accessory.model.position import rotate
from accessory.model.sequences import Sequences
from accessory.parallel.tensor import copy_to_model_parallel_region


class Attention(nn.Module):
    """softmax(q k^T / sqrt(E)) v with H query and K key/value heads; this rank holds its share of both."""

    def __init__(self, args: ModelArgs, ranks: int, **linear) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        q_width, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        column = {"cut": "column", "ranks": ranks, "bias": args.qkv_bias, **linear}
        self.wq = Linear(args.dim, q_width, **column)
        self.wk = Linear(args.dim, kv_width, **column)
        self.wv = Linear(args.dim, kv_width, **column)
        self.wo = Linear(q_width, args.dim, cut="row", ranks=ranks, bias=args.out_bias, **linear)

    def forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        """x [T, D] -> [T, D]. With a cache, the new keys and values are stored and the old ones attended to."""
        x = copy_to_model_parallel_region(x)
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, sequences.turn), rotate(k, sequences.turn)
        if cache is None:
            out = attend(q, k, v, sequences)
        else:
            cache.store(k, v, sequences)
            out = attend_cached(q, cache, sequences)
        return self.wo(out.flatten(1))


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """Causal attention inside each document: q [T, H, E], k and v [T, K, E] -> [T, H, E].

    On CUDA in half precision one variable-length flash kernel does all documents; elsewhere each gets its own call.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _attend_varlen(q, k, v, sequences)
    parts = [
        _causal(*(t.transpose(0, 1)[None] for t in document))[0].transpose(0, 1)
        for document in zip(*(t.split(sequences.lengths) for t in (q, k, v)), strict=True)
    ]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the kernel's own grouping flag came after torch 2.11
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    offsets, longest = sequences.offsets, sequences.longest
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, window_size=(-1, 0))


def attend_cached(q: Tensor, cache: LayerCache, sequences: Sequences) -> Tensor:
    """New queries q [T, H, E] against everything their documents have in the cache, causally -> [T, H, E]."""
    grouped = q.shape[1] != cache.keys.shape[2]
    if sequences.longest == 1 and len(sequences.lengths) > 1:  # one decoding step of a batch
        return _decode_batch(q, cache, sequences, grouped)
    parts = []
    for i, part in enumerate(q.split(sequences.lengths)):
        start, end = sequences.starts[i], sequences.starts[i] + sequences.lengths[i]
        keys, values = (t[i, :end].transpose(0, 1)[None] for t in (cache.keys, cache.values))
        mask = None
        if start and len(part) > 1:
            mask = torch.ones(len(part), end, dtype=torch.bool, device=q.device).tril(start)
        out = F.scaled_dot_product_attention(
            part.transpose(0, 1)[None], keys, values, attn_mask=mask, is_causal=not start and len(part) > 1,
            enable_gqa=grouped,
        )  # fmt: skip
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _decode_batch(q: Tensor, cache: LayerCache, sequences: Sequences, grouped: bool) -> Tensor:
    ends = torch.tensor(sequences.starts, device=q.device) + 1
    longest = max(sequences.starts) + 1
    mask = torch.arange(longest, device=q.device) < ends[:, None]
    keys, values = (t[:, :longest].transpose(1, 2) for t in (cache.keys, cache.values))
    out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask[:, None, None], enable_gqa=grouped)
    return out[:, :, 0]
