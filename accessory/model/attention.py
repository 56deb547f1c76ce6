"""Grouped-query attention over packed documents, and over a key/value cache when generating."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory import kernels
from accessory.kernels.plain import dropped_attention
from accessory.model.args import ModelArgs
from accessory.model.cache import LayerCache
from accessory.model.decoding import decodes
from accessory.model.dropout import drawn_seed
from accessory.model.linear import Linear, project_columns
from accessory.model.norm import RMSNorm
from accessory.model.position import append_alibi, rotate
from accessory.model.recomputable import Recomputable
from accessory.model.sequences import NextTokens, Sequences
from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import Slicing, mark


class AttentionAddition(nn.Module, ABC):
    """What a method adds to attention's result before `wo`, such as prefixes with a softmax of their own."""

    @abstractmethod
    def forward(self, q: Tensor, sequences: Sequences, attention: Attention, cache: LayerCache | None = None) -> Tensor:
        """This rank's queries [T, H, E], rotated -> what is added to attention's result [T, H, E].

        cache: attention's; its `beside` may hold what belongs to each document.
        """

    def prepare_decoding(self, attention: Attention) -> None:
        """Compute what is the same for every token of an answer, once; `train` discards it."""

    def place(self) -> object:
        """Equal for as long as what was prepared lies where it lay; by default it moves with each answer."""
        return object()

    def work_bytes(self, tokens: int, heads: int, head_dim: int, device: torch.device) -> int:
        """Bytes that it works in for `tokens` queries of this rank's heads, beside its result and its gradient."""
        return 0


class Attention(nn.Module):
    """softmax(q k^T / sqrt(E)) v with H query and K key/value heads; this rank holds its share of both.

    addition: what a method adds to that, before `wo`. dropout: the share of softmax's weights dropped while training.
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
        self.dropout = 0.0

    def forward(self, x: Tensor | Recomputable, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
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
            q, k, v = append_alibi(q, k, v, sequences.alibi)
            scale = self.head_dim**-0.5
        if cache is not None:
            cache.store(k, v, sequences)
        if self.dropout and self.training:
            # Heads are cut over the ranks: each drops weights of its own.
            seed = drawn_seed() + dist.get_rank(model_parallel_group())
            how = sequences.documents, self.window, scale, self.dropout, seed
            out = dropped_attention.attend(q, k, v, *how)
        elif cache is None or not sequences.continued:
            kernel = kernels.of("document_attention", q, q.shape[-1])
            out = kernel.attend(q, k, v, sequences.documents, self.window, scale)
        else:
            out = attend_cached(q, cache, sequences, self.window, scale)
        if self.position == "alibi":
            out = out[..., : self.head_dim]
        if self.addition is not None:
            out = out + self.addition(queries, sequences, self, cache)
        return self.wo(out.flatten(1))

    def linears_by_input(self) -> list[list[Linear]]:
        """The linears, those that share an input together."""
        return [[self.wq, self.wk, self.wv], [self.wo]]

    def _rotated(self, q: Tensor, k: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        if not decodes():
            return rotate(q, sequences.rotations, self.layout), rotate(k, sequences.rotations, self.layout)
        both = rotate(torch.cat([q, k], 1), sequences.rotations, self.layout)  # one call costs less than two
        return both.split_with_sizes([q.shape[1], k.shape[1]], 1)


def _head_norm(args: ModelArgs) -> RMSNorm:
    """A norm over each head's E channels, shared by all heads: its gradient on a rank comes from that rank's heads."""
    norm = RMSNorm(args.head_dim, args.norm_eps)
    mark(norm.weight, Slicing(partial=True))
    return norm


def attend_cached(
    q: Tensor, cache: LayerCache, sequences: Sequences, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Causal attention of new queries q [T, H, E] to all that their documents have in the cache -> [T, H, E].

    Documents with equally many new tokens are computed in one call; each gets the result that it gets alone.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(sequences, NextTokens):
        kernel = kernels.of("static_attention", q)
        return kernel.attend(q, cache.keys, cache.values, sequences.mask(window, q.dtype), scale)
    lengths, ends = sequences.lengths, sequences.ends
    if len(set(lengths)) == 1:
        kernel = kernels.of("cached_attention", q, lengths[0])
        return kernel.attend(q, cache.keys, cache.values, ends, window, scale)
    parts = []
    for i, part in enumerate(q.split(lengths)):
        one, kernel = slice(i, i + 1), kernels.of("cached_attention", q, len(part))
        parts.append(kernel.attend(part, cache.keys[one], cache.values[one], ends[one], window, scale))
    return torch.cat(parts)
