"""The decoder: embedding, blocks, final norm and head, over packed documents."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.model.args import ModelArgs
from accessory.model.block import Block
from accessory.model.cache import LayerCache
from accessory.model.norm import RMSNorm
from accessory.model.position import rotary_frequencies
from accessory.model.sequences import Sequences
from accessory.parallel.tensor import Slicing, mark, reduce_from_model_parallel_region, slice_bounds
from accessory.quant import PackedWeight


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding [V, D] shared out over the ranks: each looks up its own, and the results are summed."""

    def __init__(self, vocab_size: int, dim: int, *, rank: int, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.start, self.stop = slice_bounds(vocab_size, rank, ranks)
        shape = (self.stop - self.start, dim)
        self.weight = mark(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")), Slicing(dim=0))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, D] in the weight's dtype."""
        foreign = (tokens < self.start) | (tokens >= self.stop)
        rows = F.embedding((tokens - self.start).masked_fill(foreign, 0), self.weight)
        return reduce_from_model_parallel_region(rows.masked_fill(foreign[:, None], 0))


class Head(nn.Module):
    """Rows of the output matrix [V, D] shared out over the ranks; the loss and generation multiply with it."""

    def __init__(self, vocab_size: int, dim: int, *, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        shape = (vocab_size // ranks, dim)
        self.weight = mark(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")), Slicing(dim=0))


class Decoder(nn.Module):
    """A LLaMA-style decoder, made on the meta device and filled by `accessory.checkpoint`.

    Open at both ends: it takes token ids or embeddings, and hands each block's output to `on_block`.
    """

    def __init__(
        self,
        args: ModelArgs,
        *,
        dtype: torch.dtype,
        rank: int = 0,
        ranks: int = 1,
        storage: Callable[[tuple[int, int]], PackedWeight] | None = None,
    ) -> None:
        super().__init__()
        self.args, self.dtype, self.ranks = args, dtype, ranks
        self.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim, rank=rank, ranks=ranks, dtype=dtype)
        self.layers = nn.ModuleList(Block(args, ranks, dtype=dtype, storage=storage) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = None if args.tie_word_embeddings else Head(args.vocab_size, args.dim, ranks=ranks, dtype=dtype)
        self.register_buffer("frequencies", rotary_frequencies(args), persistent=False)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix [V / ranks, D]."""
        return (self.output or self.tok_embeddings).weight

    def forward(
        self,
        inputs: Tensor,
        sequences: Sequences,
        cache: list[LayerCache] | None = None,
        on_block: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Token ids [T] or embeddings [T, D] -> the last block's normalized output [T, D]."""
        x = inputs if inputs.is_floating_point() else self.tok_embeddings(inputs)
        x = x.to(self.dtype)
        for i, block in enumerate(self.layers):
            x = block(x, sequences, cache[i] if cache else None)
            if on_block:
                on_block(i, x)
        return self.norm(x)

    def new_cache(self, documents: int, longest: int) -> list[LayerCache]:
        """Empty key/value caches for `documents` documents of up to `longest` tokens."""
        shape = (documents, longest, self.args.n_kv_heads // self.ranks, self.args.head_dim)
        return [LayerCache(shape, self.dtype, self.frequencies.device) for _ in self.layers]
