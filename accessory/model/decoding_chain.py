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
from accessory.model.norm import LayerNorm, Norm
from accessory.model.position import alibi_channels, alibi_slopes, rotations_at
from accessory.quant.four_bit import FourBitWeight
from accessory.quant.products import Matrix


class _Links(NamedTuple):
    """The launches of a block: [q, k, v], attention, [wo], [gate, up] (or only one before an activation) and [down].

    parallel: `gated` reads what `entrance` does.
    """

    entrance: Products
    attending: Attending
    out: Products
    gated: Products
    down: Products
    parallel: bool


class Chain:
    """The blocks of a decoder for up to `kernels.decoding.MOST_ROWS` documents with a new token each.

    products, attention: the kernels' modules. longest: tokens that a document has at most. The weights must not change.
    """

    def __init__(self, decoder: Decoder, longest: int, products: object, attention: object) -> None:
        self._decoder, self._products, self._attention = decoder, products, attention
        positions, blocks = _positions(decoder, longest), [block for _, block in decoder.blocks()]
        factors = [_factors(block, decoder.dtype) for block in blocks]
        before = [_before(of, block.parallel) for of, block in zip(factors, blocks, strict=True)]
        self._first = before[0]
        self._links = [
            _links(block, of, positions, following)
            for block, of, following in zip(blocks, factors, [*before[1:], None], strict=True)
        ]
        self.longest = longest
        self._scratch: dict[int, object] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of LoRA's factors as they are laid out here."""
        tensors = [self._first]
        for link in self._links:
            for products in (link.entrance, link.out, link.gated, link.down):
                tensors += [products.b, products.following, products.corrections]
            tensors.append(link.attending.following)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def forward(self, tokens: Tensor, positions: Tensor, cache: list[LayerCache], span: int) -> Tensor:
        """Token ids [rows] at `positions` int64 [rows] -> the head's input [rows, D].

        cache: of at least so many documents; keys and values are written there. span: as in `NextTokens`.
        """
        decoder, multiply = self._decoder, self._products.multiply
        x = F.embedding(tokens.clamp(min=0), decoder.tok_embeddings.weight).to(decoder.dtype)
        if decoder.pos_embeddings is not None:
            x = x + decoder.pos_embeddings(positions).to(x.dtype)
        if decoder.tok_norm is not None:
            x = decoder.tok_norm(x)
        lows = None if self._first is None else (x @ self._first.t()).float()[:, None]
        scratch = self._scratch_for(len(tokens))
        for link, layer in zip(self._links, cache, strict=True):
            projected, _ = multiply(link.entrance, x, _of(link.entrance, lows))
            place = layer.keys, layer.values, positions, span, scratch
            attended, after = self._attention.attend(link.attending, projected, *place)
            middle, after = multiply(link.out, attended, after, x)
            read = (x, lows) if link.parallel else (middle, after)
            hidden, after = multiply(link.gated, read[0], _of(link.gated, read[1]))
            x, lows = multiply(link.down, hidden, after, middle)
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
        "norms": args.norm_placement == "before",
        "width of heads": args.head_dim in (16, 32, 64, 128, 256),
        "feed-forward": args.activation in ACTIVATIONS,
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


class _Factors(NamedTuple):
    """LoRA of linears that share an input. b [N, R], scaled. a [R a linear, K], times the norm's weight.

    corrections: see `Products`.
    """

    b: Tensor | None = None
    a: Tensor | None = None
    corrections: Tensor | None = None


def _factors(block: Block, dtype: torch.dtype) -> dict[str, _Factors]:
    attention, feed_forward = block.attention, block.feed_forward
    return {
        "entrance": _joined([attention.wq, attention.wk, attention.wv], block.attention_norm, dtype),
        "out": _joined([attention.wo], None, dtype),
        "gated": _joined(feed_forward.linears_by_input()[0], block.ffn_norm, dtype),
        "down": _joined([feed_forward.w2], None, dtype),
    }


def _joined(linears: list[Linear], norm: Norm | None, dtype: torch.dtype) -> _Factors:
    """The factors of linears behind `norm`.

    All get the same R: smaller ranks, and linears without LoRA, are padded with zeros, and A's rows to a power of two.
    """
    rank = filled_up(max((len(linear.lora_a.weight) for linear in linears if linear.lora_a is not None), default=0))
    if not rank:
        return _Factors()
    device, count, width = _device(linears), len(linears) * rank, linears[0].weight.shape[1]
    second = torch.zeros(sum(linear.weight.shape[0] for linear in linears), rank, dtype=dtype, device=device)
    first = torch.zeros(filled_up(count), width, dtype=dtype, device=device)
    shifted = torch.zeros(count, device=device)
    row = 0
    for i, linear in enumerate(linears):
        n = linear.weight.shape[0]
        if linear.lora_a is not None:
            a, b, at = linear.lora_a.weight, linear.lora_b.weight, slice(i * rank, i * rank + len(linear.lora_a.weight))
            second[row : row + n, : len(a)] = b * linear.lora_scale
            first[at] = a if norm is None else a * norm.weight
            if isinstance(norm, LayerNorm):
                shifted[at] = a.float() @ norm.bias.float()
        row += n
    # Of A as it is rounded here: the mean of x must cancel.
    corrections = torch.stack([first[:count].float().sum(1), shifted]) if isinstance(norm, LayerNorm) else None
    return _Factors(second, first, corrections)


def _before(factors: dict[str, _Factors], parallel: bool) -> Tensor | None:
    """A of all linears that read what a block reads."""
    both = [factors["entrance"].a, factors["gated"].a if parallel else None]
    there = [a for a in both if a is not None]
    if len(there) < 2:
        return there[0] if there else None
    joined = torch.cat(there)
    return F.pad(joined, (0, 0, 0, filled_up(len(joined)) - len(joined)))


def _of(products: Products, lows: Tensor | None) -> Tensor | None:
    """The low products, if these linears have a LoRA: others that read the same may have one."""
    return None if products.b is None else lows


class _Positions(NamedTuple):
    """As of `Attending`: rotations of all positions, ALiBi's slopes, and what keys have behind their channels."""

    rotations: Tensor
    slopes: Tensor | None = None
    beyond: Tensor | None = None


def _positions(decoder: Decoder, longest: int) -> _Positions:
    device, args = decoder.frequencies.device, decoder.args
    tokens = torch.arange(longest, device=device)
    rotations = rotations_at(decoder.frequencies, tokens)[:, 0].contiguous()
    if args.position != "alibi":
        return _Positions(rotations)
    slopes = alibi_slopes(args.n_heads).to(device)
    _, beyond = alibi_channels(slopes, tokens, args.head_dim, decoder.dtype)
    return _Positions(rotations, slopes.float(), beyond[:, 0].contiguous())


def _links(block: Block, factors: dict[str, _Factors], positions: _Positions, following: Tensor | None) -> _Links:
    """following: A of the linears that read what the next block reads."""
    attention, feed_forward, parallel = block.attention, block.feed_forward, block.parallel
    heads, kv_heads = (linear.weight.shape[0] // attention.head_dim for linear in (attention.wq, attention.wk))

    def products(name: str, linears: list[Linear], norm: Norm | None = None, **rest: object) -> Products:
        """The product of linears that share an input."""
        weight, eps = (None, 0.0) if norm is None else (_weight(norm), norm.eps)
        matrices = tuple(_matrix(linear.weight) for linear in linears)
        own = factors[name]
        return Products(matrices, weight, eps, own.b, _bias(linears), corrections=own.corrections, **rest)

    entrance = factors["entrance"].a
    return _Links(
        products("entrance", [attention.wq, attention.wk, attention.wv], block.attention_norm),
        Attending(
            heads, kv_heads, attention.head_dim, positions.rotations, attention.layout, attention.head_dim**-0.5,
            attention.window, factors["out"].a, *_head_norms(attention), positions.slopes, positions.beyond,
        ),
        products("out", [attention.wo], following=None if parallel else factors["gated"].a),
        products(
            "gated", feed_forward.linears_by_input()[0], block.ffn_norm, activation=feed_forward.activation,
            following=factors["down"].a, low_at=len(entrance) if parallel and entrance is not None else 0,
        ),
        products("down", [feed_forward.w2], following=following),
        parallel,
    )  # fmt: skip


def _weight(norm: Norm) -> Tensor:
    """As of `Products`."""
    weight = norm.weight.detach().float()
    return torch.stack([weight, norm.bias.detach().float()]) if isinstance(norm, LayerNorm) else weight.contiguous()


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
