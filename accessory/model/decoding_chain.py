"""A token's way through the decoder in five launches a block, where the blocks and the base's storage allow it.

Each launch also computes what lies between two products with the weights, and the products with LoRA's first factors:
see `accessory.kernels.decoding`. Their arguments are prepared here, once for each state of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.codes import BLOCK, Codes
from accessory.kernels.decoding import ACTIVATIONS, Attending, Products, filled_up
from accessory.model.attention import Attention
from accessory.model.block import Block
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.model.norm import RMSNorm
from accessory.model.position import rotations_at
from accessory.quant.four_bit import FourBitWeight
from accessory.quant.products import Matrix


class _Links(NamedTuple):
    """The launches of a block: [q, k, v], attention, [wo], [gate, up] and [down]."""

    entrance: Products
    attending: Attending
    out: Products
    gated: Products
    down: Products


class Chain:
    """The blocks of a decoder for up to `kernels.decoding.MOST_ROWS` documents with a new token each.

    products, attention: the kernels' modules. longest: tokens that a document has at most. The weights must not change.
    """

    def __init__(self, decoder: Decoder, longest: int, products: object, attention: object) -> None:
        self._decoder, self._products, self._attention = decoder, products, attention
        tokens = torch.arange(longest, device=decoder.frequencies.device)
        rotations = rotations_at(decoder.frequencies, tokens)[:, 0].contiguous()
        blocks = [block for _, block in decoder.blocks()]
        factors = [_factors(block, decoder.dtype) for block in blocks]
        self._first = factors[0]["entrance"][1]
        after = [*(of["entrance"][1] for of in factors[1:]), None]
        self._links = [
            _links(block, of, rotations, following) for block, of, following in zip(blocks, factors, after, strict=True)
        ]
        self.longest = longest
        self._scratch: dict[int, object] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of LoRA's factors as they are laid out here."""
        tensors = [self._first]
        for link in self._links:
            for products in (link.entrance, link.out, link.gated, link.down):
                tensors += [products.b, products.following]
            tensors.append(link.attending.following)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def forward(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache], span: int) -> Tensor:
        """Token ids [rows] at `positions` int64 [rows] -> the head's input [rows, D].

        cache: of at least so many documents; keys and values are written there. span: as in `NextTokens`.
        """
        decoder, multiply = self._decoder, self._products.multiply
        x = F.embedding(tokens.clamp(min=0), decoder.tok_embeddings.weight).to(decoder.dtype)
        lows = None if self._first is None else (x @ self._first.t()).float()[:, None]
        scratch = self._scratch_for(len(tokens))
        for link, layer in zip(self._links, cache, strict=True):
            projected, _ = multiply(link.entrance, x, lows)
            place = layer.keys, layer.values, positions, span, scratch
            attended, lows = self._attention.attend(link.attending, projected, *place)
            x, lows = multiply(link.out, attended, lows, x)
            hidden, lows = multiply(link.gated, x, lows)
            x, lows = multiply(link.down, hidden, lows, x)
        return decoder.leave(x)

    def _scratch_for(self, rows: int) -> object:
        if rows not in self._scratch:
            place = self._links[0].attending, rows, self.longest, self._decoder.frequencies.device
            self._scratch[rows] = self._attention.Scratch(*place)
        return self._scratch[rows]


def why_not(decoder: Decoder) -> str:
    """What the decoder has that the chain cannot compute; empty: the chain fits."""
    args, blocks = decoder.args, [block for _, block in decoder.blocks()]
    wanted = {
        "what is added to attention": all(block.attention.addition is None for block in blocks),
        "scales of outputs": all(linear.scale is None for block in blocks for linear in _linears(block)),
        "side network": type(decoder) is Decoder,
        "model-parallel ranks": decoder.ranks == 1,
        "norms": args.norm == "rms" and args.norm_placement == "before" and not args.parallel_residual,
        "norm of embeddings": decoder.tok_norm is None,
        "positions": args.position == "rotary",
        "width of heads": args.head_dim in (16, 32, 64, 128, 256),
        "feed-forward": args.gated and args.activation in ACTIVATIONS,
        "width of embeddings": decoder.project_in is None,
    }
    for what, fits in wanted.items():
        if not fits:
            return what
    weights = [linear.weight for block in blocks for linear in _linears(block)]
    kinds = {_kind(weight, decoder.dtype) for weight in weights}
    if None in kinds:
        return "storage"
    if len(kinds) > 1:
        return "storages that differ"
    return "width of matrices" if any(weight.shape[1] % BLOCK for weight in weights) else ""


def _kind(weight: Matrix, dtype: torch.dtype) -> tuple | None:
    """What all matrices must have in common; None: the kernels cannot read it."""
    if isinstance(weight, Tensor):
        return (dtype,) if weight.dtype == dtype and weight.is_contiguous() else None
    return (weight.quant_type, weight.nested) if isinstance(weight, FourBitWeight) else None


def _linears(block: Block) -> list[Linear]:
    inputs = (*block.attention.linears_by_input(), *block.feed_forward.linears_by_input())
    return [linear for linears in inputs for linear in linears]


def _factors(block: Block, dtype: torch.dtype) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    attention, feed_forward = block.attention, block.feed_forward
    return {
        "entrance": _joined([attention.wq, attention.wk, attention.wv], block.attention_norm, dtype),
        "out": _joined([attention.wo], None, dtype),
        "gated": _joined([feed_forward.w1, feed_forward.w3], block.ffn_norm, dtype),
        "down": _joined([feed_forward.w2], None, dtype),
    }


def _joined(linears: list[Linear], norm: RMSNorm | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """LoRA of linears that share an input: (B [N, R], scaled, A [R a linear, K] times the norm's weight), or nothing.

    All get the same R: smaller ranks, and linears without LoRA, are padded with zeros, and A's rows to a power of two.
    """
    rank = filled_up(max((len(linear.lora_a.weight) for linear in linears if linear.lora_a is not None), default=0))
    if not rank:
        return None, None
    device = _device(linears)
    second = torch.zeros(sum(linear.weight.shape[0] for linear in linears), rank, dtype=dtype, device=device)
    first = torch.zeros(filled_up(len(linears) * rank), linears[0].weight.shape[1], dtype=dtype, device=device)
    row = 0
    for i, linear in enumerate(linears):
        n = linear.weight.shape[0]
        if linear.lora_a is not None:
            a, b = linear.lora_a.weight, linear.lora_b.weight
            second[row : row + n, : len(a)] = b * linear.lora_scale
            first[i * rank : i * rank + len(a)] = a if norm is None else a * norm.weight
        row += n
    return second, first


def _links(
    block: Block,
    factors: dict[str, tuple[Tensor | None, Tensor | None]],
    rotations: Tensor,
    following: Tensor | None,
) -> _Links:
    """following: A of the next block's first linears."""
    attention, feed_forward = block.attention, block.feed_forward
    heads, kv_heads = (linear.weight.shape[0] // attention.head_dim for linear in (attention.wq, attention.wk))

    def products(name: str, linears: list[Linear], norm: RMSNorm | None = None, **rest: object) -> Products:
        """The product of linears that share an input."""
        weight, eps = (None, 0.0) if norm is None else (norm.weight.detach().float().contiguous(), norm.eps)
        matrices = tuple(_matrix(linear.weight) for linear in linears)
        return Products(matrices, weight, eps, factors[name][0], _bias(linears), **rest)

    return _Links(
        products("entrance", [attention.wq, attention.wk, attention.wv], block.attention_norm),
        Attending(
            heads, kv_heads, attention.head_dim, rotations, attention.layout, attention.head_dim**-0.5,
            attention.window, factors["out"][1], *_head_norms(attention),
        ),
        products("out", [attention.wo], following=factors["gated"][1]),
        products(
            "gated", [feed_forward.w1, feed_forward.w3], block.ffn_norm, activation=feed_forward.activation,
            following=factors["down"][1],
        ),
        products("down", [feed_forward.w2], following=following),
    )  # fmt: skip


def _head_norms(attention: Attention) -> tuple[tuple[Tensor, Tensor] | None, float]:
    """Weights of the norms of queries and keys, and what they add to a mean square."""
    if attention.q_norm is None:
        return None, 0.0
    weights = (norm.weight.detach().float().contiguous() for norm in (attention.q_norm, attention.k_norm))
    return tuple(weights), attention.q_norm.eps


def _matrix(weight: Matrix) -> Codes | Tensor:
    return weight.detach() if isinstance(weight, Tensor) else weight.as_codes()


def _device(linears: list[Linear]) -> torch.device:
    weight = linears[0].weight
    return weight.device if isinstance(weight, Tensor) else weight.codes.device


def _bias(linears: list[Linear]) -> Tensor | None:
    if all(linear.bias is None for linear in linears):
        return None
    device = _device(linears)
    zeros = (torch.zeros(linear.weight.shape[0], device=device) for linear in linears)
    biases = (
        zero if linear.bias is None else linear.bias.detach().float()
        for zero, linear in zip(zeros, linears, strict=True)
    )
    return torch.cat(list(biases))
