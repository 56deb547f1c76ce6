"""The decoder: embedding, blocks, final norm and head, over packed documents."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.errors import ConfigError
from accessory.kernels.addition import Addition
from accessory.model.args import ModelArgs
from accessory.model.block import Block
from accessory.model.cache import LayerCache
from accessory.model.dropout import dropped
from accessory.model.norm import make_norm
from accessory.model.position import ALIBI_WIDTH, alibi_channels, alibi_slopes_on, rotary_frequencies
from accessory.model.projection import project
from accessory.model.recomputable import Recomputable
from accessory.model.sequences import NextTokens, Sequences
from accessory.parallel.data import is_sharded
from accessory.parallel.tensor import (
    WHOLE,
    Slicing,
    mark,
    padded_bounds,
    reduce_from_model_parallel_region,
    slice_bounds,
)
from accessory.quant import PackedWeight


class VocabParallelEmbedding(nn.Module):
    """The embedding [V, D], its rows divided over the ranks: each looks up its own, and the results are summed.

    Every rank has equally many rows; where the ranks do not divide V, the last ones are padding.
    """

    def __init__(self, vocab_size: int, dim: int, *, rank: int, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.start, self.stop = padded_bounds(vocab_size, rank, ranks)
        self.weight = _vocabulary_rows(vocab_size, dim, ranks, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, D] in the weight's dtype."""
        foreign = (tokens < self.start) | (tokens >= self.stop)
        rows = F.embedding((tokens - self.start).masked_fill(foreign, 0), self.weight)
        return reduce_from_model_parallel_region(rows.masked_fill(foreign[:, None], 0))


class Head(nn.Module):
    """The output matrix [V, D], divided as the embedding is; the loss and generation multiply with it."""

    def __init__(self, vocab_size: int, dim: int, *, ranks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _vocabulary_rows(vocab_size, dim, ranks, dtype)


def _vocabulary_rows(vocab_size: int, dim: int, ranks: int, dtype: torch.dtype) -> nn.Parameter:
    shape = (-(-vocab_size // ranks), dim)
    return mark(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")), Slicing(dim=0, whole=vocab_size))


class PositionEmbedding(nn.Module):
    """A learned row for each position, whole on every rank; position 0 has row `offset`."""

    def __init__(self, positions: int, dim: int, *, offset: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.offset = offset
        shape = (positions + offset, dim)
        self.weight = mark(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")), WHOLE)

    def forward(self, positions: Tensor) -> Tensor:
        """positions [T] -> [T, D] in the weight's dtype."""
        return F.embedding(positions + self.offset, self.weight)


class Projection(nn.Module):
    """A plain matrix between two widths, such as the embedding's and the model's, whole on every rank."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, bias: bool = False) -> None:
        super().__init__()
        shape = (out_features, in_features)
        self.weight = mark(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")), WHOLE)
        self.bias = mark(nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta")), WHOLE) if bias else None

    def forward(self, x: Tensor | Recomputable) -> Tensor:
        """x [T, in] -> x W^T + b [T, out] in x's dtype."""
        return project(x, [self.weight], [Addition(self.bias)])[0]


class Decoder(nn.Module):
    """The decoder that `args` describes, made on the meta device and filled by `accessory.checkpoint`.

    It takes token ids or embeddings; `enter`, `states` and `leave` run it step by step and give each block's output.
    """

    def __init__(
        self,
        args: ModelArgs,
        *,
        dtype: torch.dtype,
        rank: int = 0,
        ranks: int = 1,
        storage: type[PackedWeight] | None = None,
    ) -> None:
        super().__init__()
        self.args, self.dtype, self.rank, self.ranks = args, dtype, rank, ranks
        vocabulary = {"vocab_size": args.vocab_size, "dim": args.embedding_dim, "ranks": ranks, "dtype": dtype}
        self.tok_embeddings = VocabParallelEmbedding(rank=rank, **vocabulary)
        self._make_entrance()
        self.layers = nn.ModuleList(Block(args, i, ranks, dtype=dtype, storage=storage) for i in range(args.n_layers))
        self.norm = make_norm(args, args.dim) if args.final_norm else None
        narrow = args.embedding_dim != args.dim
        self.project_out = Projection(args.dim, args.embedding_dim, dtype) if narrow else None
        self.output = None if args.tie_word_embeddings else Head(**vocabulary)
        self.register_buffer("frequencies", rotary_frequencies(args), persistent=False)
        self.embed_dropout = 0.0
        self.answering: Any = None  # what generation keeps for the next answers

    def _make_entrance(self) -> None:
        """Make what comes between the embedding and the first block."""
        args, dtype = self.args, self.dtype
        narrow, learned = args.embedding_dim != args.dim, args.position == "learned"
        self.project_in = Projection(args.embedding_dim, args.dim, dtype) if narrow else None
        self.pos_embeddings = (
            PositionEmbedding(args.max_seq_len, args.dim, offset=args.position_offset, dtype=dtype) if learned else None
        )
        self.tok_norm = make_norm(args, args.dim) if args.embedding_norm else None

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows of the output matrix [V / ranks, embedding_dim]; those from V on are padding."""
        return (self.output or self.tok_embeddings).weight

    def sequences(
        self, lengths: tuple[int, ...], starts: tuple[int, ...] | None = None, shared: tuple[int, ...] | None = None
    ) -> Sequences:
        """Positions of documents of `lengths` new tokens, which follow `starts` tokens that are in the cache already.

        shared: as in `Sequences.build`. Raises `ConfigError` for a document longer than the model's positions reach.
        """
        made = Sequences.build(lengths, self.frequencies, starts, shared)
        longest = max(start + length for start, length in zip(made.starts, lengths, strict=True))
        limit = self.args.longest_document
        if limit is not None and longest > limit:
            raise ConfigError(
                f"A document has {longest} tokens; this model has positions for {limit}. Give --max_words {limit} (for "
                f"training) or --max_seq_len {limit} (for asking), or less."
            )
        return self._with_alibi(made, self.args)

    def next_tokens(self, positions: Tensor, span: int) -> NextTokens:
        """One new token of each document, behind the cached ones: see `NextTokens`."""
        return self._with_alibi(NextTokens.at(positions, self.frequencies, span), self.args)

    def _with_alibi(self, sequences: Sequences, args: ModelArgs) -> Sequences:
        """The same with ALiBi's channels, for blocks of `args` that use it."""
        if args.position != "alibi":
            return sequences
        mine = slice_bounds(args.n_heads, self.rank, self.ranks)
        slopes = alibi_slopes_on(self.frequencies.device, args.n_heads, *mine)
        return sequences.with_alibi(alibi_channels(slopes, sequences.positions, args.head_dim, self.dtype))

    def forward(self, inputs: Tensor, sequences: Sequences, cache: list[LayerCache] | None = None) -> Tensor:
        """Token ids [T] or their embeddings [T, embedding_dim] -> the head's input [T, embedding_dim]."""
        (last,) = deque(self.states(self.enter(inputs, sequences), sequences, cache), maxlen=1)
        return self.leave(last)

    def learned(self, labels: Tensor, weights: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The labels [T] that this step learns from, negative elsewhere, the weights [T] of their losses, their rows.

        weights: fp32; None: all are 1. rows: int64 [L], the tokens with a label, in order. By default all stay as they
        are.
        """
        return labels, weights, rows

    def enter(self, inputs: Tensor, sequences: Sequences) -> Tensor:
        """Token ids [T] or their embeddings [T, embedding_dim] -> the first block's input [T, D]."""
        x = inputs if inputs.is_floating_point() else self.tok_embeddings(inputs)
        x = x.to(self.dtype)
        if self.embed_dropout and self.training:
            x = dropped(x, self.embed_dropout)
        if self.project_in is not None:
            x = self.project_in(x)
        if self.pos_embeddings is not None:
            x = x + self.pos_embeddings(sequences.positions).to(x.dtype)
        return x if self.tok_norm is None else self.tok_norm(x)

    def states(self, x: Tensor, sequences: Sequences, cache: list[LayerCache] | None = None) -> Iterator[Tensor]:
        """The first block's input [T, D] -> each block's output [T, D], computed when it is asked for.

        cache: one for each block; a subclass may append its own.
        """
        for i, block in enumerate(self.layers):
            x = block(x, sequences, cache[i] if cache else None)
            yield x

    def leave(self, x: Tensor) -> Tensor:
        """The last block's output [T, D] -> normalized and projected to the embedding's width [T, embedding_dim]."""
        x = x if self.norm is None else self.norm(x)
        return x if self.project_out is None else self.project_out(x)

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """(name, module) of each block, the unit of loading, sharding and recomputing, in the order they run in."""
        for i, block in enumerate(self.layers):
            yield f"layers.{i}", block

    def drop_out(self, embedding: float, attention: float) -> None:
        """While training, drop these shares of the embeddings' values and of the blocks' attention weights."""
        self.embed_dropout = embedding
        for block in self.layers:
            block.attention.dropout = attention

    def place(self, device: torch.device) -> None:
        """Move the buffers that no checkpoint holds to `device`."""
        self.frequencies = self.frequencies.to(device)

    def train(self, mode: bool = True) -> Decoder:
        """As every module's; training needs the memory that answers were given in."""
        self.answering = None if mode else self.answering
        return super().train(mode)

    def prepare_decoding(self) -> None:
        """Prepare the blocks for decoding, a few tokens at a time; `train` undoes it. Sharded ones stay as they are."""
        for _, block in self.blocks():
            if not any(map(is_sharded, block.parameters())):
                block.prepare_decoding()

    def make_room_for_pictures(self, cache: list[LayerCache]) -> None:
        """Have whole caches hold, from now on, what a document's picture adds beside the tokens.

        Raises `ConfigError`: here pictures enter as rows of the sequence.
        """
        raise ConfigError("A picture of 0 rows was given to a model whose blocks have no prefixes (llama_adapter).")

    def new_cache(self, documents: int, longest: int) -> list[LayerCache]:
        """Empty key/value caches for `documents` documents of up to `longest` tokens, one for each block."""
        return self._empty_caches(self.args, documents, longest)

    def _empty_caches(self, args: ModelArgs, documents: int, longest: int) -> list[LayerCache]:
        """One for each block that `args` describes."""
        width = args.head_dim + (ALIBI_WIDTH if args.position == "alibi" else 0)
        shape = (documents, longest, args.n_kv_heads // self.ranks, width)
        return [LayerCache(shape, self.dtype, self.frequencies.device) for _ in range(args.n_layers)]
