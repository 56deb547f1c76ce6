"""Grouped-query attention over packed documents, and over a key/value cache when generating."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory import kernels
from accessory.model.args import ModelArgs
from accessory.model.cache import LayerCache
from accessory.model.decoding import decodes
from accessory.model.document_attention import attend_by_document
from accessory.model.linear import Linear, prepare_decoding, project_columns
from accessory.model.norm import RMSNorm
from accessory.model.packed_attention import attend_packed, attends
from accessory.model.position import lean, rotate
from accessory.model.recomputed import Recomputed
from accessory.model.sequences import Sequences
from accessory.parallel.tensor import Slicing, mark


class AttentionAddition(nn.Module, ABC):
    """What a method adds to attention's result before `wo`, such as prefixes with a softmax of their own."""

    @abstractmethod
    def forward(self, q: Tensor, sequences: Sequences, attention: Attention) -> Tensor:
        """This rank's queries [T, H, E] as attention has them, rotated -> what is added to its result [T, H, E]."""

    def prepare_decoding(self, attention: Attention) -> None:
        """Make what is the same for every token of an answer; `train` forgets it."""


class Attention(nn.Module):
    """softmax(q k^T / sqrt(E)) v with H query and K key/value heads; this rank holds its share of both.

    addition: what a method put between that and `wo`.
    """

    def __init__(self, args: ModelArgs, layer: int, ranks: int, **linear) -> None:
        super().__init__()
        self.head_dim, self.position, self.layout = args.head_dim, args.position, args.rotary_layout
        self.window = args.window(layer)
        q_width, kv_width = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        column = {"cut": "column", "ranks": ranks, "bias": args.qkv_bias, **linear}
        self.wq = Linear(args.dim, q_width, **column)
        self.wk = Linear(args.dim, kv_width, **column)
        self.wv = Linear(args.dim, kv_width, **column)
        self.wo = Linear(q_width, args.dim, cut="row", ranks=ranks, bias=args.out_bias, **linear)
        self.q_norm = _head_norm(args) if args.qk_norm else None
        self.k_norm = _head_norm(args) if args.qk_norm else None
        self.addition: AttentionAddition | None = None

    def forward(self, x: Tensor | Recomputed, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        """x [T, D] -> [T, D]. With a cache, the new keys and values are stored and the old ones attended to."""
        projected = project_columns(x, [self.wq, self.wk, self.wv])
        q, k, v = (y.view(y.shape[0], -1, self.head_dim) for y in projected)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        scale = None
        if self.position == "rotary":
            q, k = self._rotated(q, k, sequences)
        queries = None if self.addition is None else q
        if self.position == "alibi":
            q, k, v = lean(q, k, v, sequences.lean)
            scale = self.head_dim**-0.5
        if cache is not None:
            cache.store(k, v, sequences)
        if cache is None or not any(sequences.starts):
            out = attend(q, k, v, sequences, self.window, scale)
        else:
            out = attend_cached(q, cache, sequences, self.window, scale)
        if self.position == "alibi":
            out = out[..., : self.head_dim]
        if self.addition is not None:
            out = out + self.addition(queries, sequences, self)
        return self.wo(out.flatten(1))

    def prepare_decoding(self) -> None:
        """Make ready for single tokens."""
        for together in self.called_together():
            prepare_decoding(together)
        if self.addition is not None:
            self.addition.prepare_decoding(self)

    def called_together(self) -> list[list[Linear]]:
        """The linears that share an input, and those that do not."""
        return [[self.wq, self.wk, self.wv], [self.wo]]

    def _rotated(self, q: Tensor, k: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        if not decodes():
            return rotate(q, sequences.turn, self.layout), rotate(k, sequences.turn, self.layout)
        both = rotate(torch.cat([q, k], 1), sequences.turn, self.layout)  # one call costs less than two
        return both.split_with_sizes([q.shape[1], k.shape[1]], 1)


def _head_norm(args: ModelArgs) -> RMSNorm:
    """A norm over each head's E channels, shared by all heads: its gradient on a rank comes from that rank's heads."""
    norm = RMSNorm(args.head_dim, args.norm_eps)
    mark(norm.weight, Slicing(partial=True))
    return norm


def attend(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention inside each document: q [T, H, E], k and v [T, K, E] -> [T, H, E].

    window: how many keys up to its own a query sees; all when absent. scale: of the scores; 1 / sqrt(E) when absent.
    On CUDA in half precision one variable-length flash kernel does all documents, in bf16 on a CPU that has AVX512-bf16
    one of ours, elsewhere `attend_by_document`.
    """
    if attends(q.device, q.dtype, q.shape[-1]):
        return attend_packed(q, k, v, sequences, window, scale)
    if sequences.prefixes is None:
        return _attend_whole(q, k, v, sequences, window, scale)
    q, k, v = (sequences.prefixes.lay_out(t) for t in (q, k, v))
    return sequences.prefixes.pack(_attend_whole(q, k, v, sequences, window, scale))


def _attend_whole(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None, scale: float | None
) -> Tensor:
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return _attend_varlen(q, k, v, sequences, window, scale)
    return attend_by_document(q, k, v, sequences.lengths, window, scale, sequences.shared)


def _attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # CUDA only

    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # the kernel's own grouping flag came after torch 2.11
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    offsets, longest = sequences.offsets, sequences.longest
    before = -1 if window is None else window - 1
    return varlen_attn(q, k, v, offsets, offsets, longest, longest, scale=scale, window_size=(before, 0))


def attend_cached(
    q: Tensor, cache: LayerCache, sequences: Sequences, window: int | None = None, scale: float | None = None
) -> Tensor:
    """New queries q [T, H, E] against everything their documents have in the cache, causally -> [T, H, E].

    One document after the other, whatever stands beside it: no padding is read, and it gets what it gets alone.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    kernel, lengths = kernels.chosen("cached_attention", q.device, q.dtype), sequences.lengths
    if kernel and lengths == (1,) * len(lengths):
        return kernel.attend(q, cache.keys, cache.values, sequences.ends, window, scale)
    parts = []
    for i, part in enumerate(q.split(lengths)):
        keys, values, end = cache.keys[i : i + 1], cache.values[i : i + 1], sequences.ends[i]
        if kernel and len(part) == 1:
            parts.append(kernel.attend(part, keys, values, (end,), window, scale))
        else:
            parts.append(_attend_document(part, keys[0, :end], values[0, :end], window, scale))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend_document(q: Tensor, keys: Tensor, values: Tensor, window: int | None, scale: float) -> Tensor:
    """The last tokens' queries [S, H, E] of one document, keys and values [n, K, E] of all -> [S, H, E]."""
    first = 0 if window is None else max(len(keys) - len(q) - window + 1, 0)
    keys, values = (t[first:].transpose(0, 1)[None] for t in (keys, values))
    if len(q) == 1:  # sees them all: heads that share keys can be rows of one head, at a fifth of the time
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
