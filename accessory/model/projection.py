"""The products of linears that read the same input, base, LoRA and bias together, in one autograd function.

It keeps neither unpacked matrices nor what can be made again, and forms no gradient of a frozen matrix. Norms alone or
biases alone keep nothing of x; LoRA keeps x (or how to make it again) and x A^T, R numbers a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from accessory import kernels
from accessory.kernels.avx512.four_bit_gemv import Beside
from accessory.model.low_rank import Draw
from accessory.model.recomputed import Recomputed
from accessory.quant import PackedWeight
from accessory.quant.packed import LowRankTerm
from accessory.quant.products import multiply, sum_of_transposed_products

PLAIN = Draw(1.0)
"""Neither scaled nor dropped out of."""


class Product(NamedTuple):
    """One linear's part of a projection: y = x W^T + scale * (x A^T) B^T + bias, whatever of it there is.

    weight: a packed W [N, K], or a plain one of any float dtype, cast for each use and never kept cast. bias [N];
    a [R, K]; b [N, R].
    """

    weight: Tensor | PackedWeight
    bias: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    draw: Draw = PLAIN


def project(x: Tensor | Recomputed, products: list[Product], unread: bool = False) -> tuple[Tensor, ...]:
    """x [T, K] -> one y [T, N] for each of `products`, in x's dtype.

    unread: only the backward is wanted; y is not filled.
    """
    source = Recomputed.of(x)
    if not torch.is_grad_enabled():  # an autograd function is a good part of the work on one token
        return _without_gradient(source.value, products)
    packed = [p.weight if isinstance(p.weight, PackedWeight) else None for p in products]
    plain = [None if isinstance(p.weight, PackedWeight) else p.weight for p in products]
    flat = [t for p, weight in zip(products, plain, strict=True) for t in (weight, p.bias, p.a, p.b)]
    return _Projection.apply(source.value, source, packed, [p.draw for p in products], unread, *flat)


def _without_gradient(x: Tensor, products: list[Product]) -> tuple[Tensor, ...]:
    first, *others = [product.weight for product in products]
    draws = [product.draw for product in products]
    if isinstance(first, PackedWeight) and not any(draw.dropout for draw in draws):
        decoded = first.decode(x, others, _beside(products))
        if decoded is not None:
            return decoded
    lows = [
        None if low is None else LowRankTerm(low, product.b, product.draw.scale)
        for low, product in zip(_low_products(x, products, draws), products, strict=True)
    ]
    return tuple(multiply(x, p.weight, p.bias, low) for p, low in zip(products, lows, strict=True))


def _beside(products: list[Product]) -> list[Beside] | None:
    if all(product.bias is None and product.a is None for product in products):
        return None
    return [Beside(product.bias, product.a, product.b, product.draw.scale) for product in products]


class _Tensors(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None

    @staticmethod
    def split(flat: list[Tensor | None]) -> list[_Tensors]:
        """Four for each linear, from all of them in a row."""
        return [_Tensors(*flat[i : i + 4]) for i in range(0, len(flat), 4)]


class _Projection(torch.autograd.Function):
    """The module of a packed matrix rather than its tensors is held for the backward: a sharded base is gathered into
    other memory by then.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        source: Recomputed,
        packed: list[PackedWeight | None],
        draws: list[Draw],
        unread: bool,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        parts = _Tensors.split(flat)
        lows = _low_products(x, parts, draws)
        outputs = []
        for part, matrix, draw, low in zip(parts, packed, draws, lows, strict=True):
            if unread:
                outputs.append(x.new_empty(len(x), _rows(matrix, part)))
                continue
            beside = None if low is None else LowRankTerm(low, part.b, draw.scale)
            outputs.append(multiply(x, part.weight if matrix is None else matrix, part.bias, beside))
        wanted = [_Tensors(*ctx.needs_input_grad[i : i + 4]) for i in range(5, len(flat) + 5, 4)]
        keeps_x = any(need.weight or need.a for need in wanted)
        ctx.packed, ctx.draws, ctx.wanted, ctx.make = packed, draws, wanted, source.make
        ctx.inputs = len(source.inputs) if keeps_x else 0
        ctx.save_for_backward(*source.inputs[: ctx.inputs], *lows, *flat)
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        count = len(ctx.packed)
        x = ctx.make(*saved[: ctx.inputs]) if ctx.inputs else None
        lows = saved[ctx.inputs : ctx.inputs + count]
        parts = _Tensors.split(saved[ctx.inputs + count :])
        narrow = _low_gradients(gradients, parts, ctx.draws)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(gradients, narrow, ctx.packed, parts, ctx.draws)
        flat: list[Tensor | None] = []
        das = _gradients_of_a(x, narrow, parts, ctx.wanted, ctx.draws)
        for dy, da, low, part, need, draw in zip(gradients, das, lows, parts, ctx.wanted, ctx.draws, strict=True):
            flat += [
                (dy.t() @ x).to(part.weight.dtype) if need.weight else None,
                column_sums(dy).to(part.bias.dtype) if need.bias else None,
                da,
                (dy.t() @ low).mul_(draw.scale).to(part.b.dtype) if need.b else None,
            ]
        return dx, None, None, None, None, *flat


def _rows(packed: PackedWeight | None, part: _Tensors) -> int:
    return (part.weight if packed is None else packed).shape[0]


def _together(parts: list[_Tensors] | list[Product], draws: list[Draw]) -> list[int]:
    """Which of the linears' A are multiplied in one product: those that read x without dropout."""
    return [
        i for i, (part, draw) in enumerate(zip(parts, draws, strict=True)) if part.a is not None and not draw.dropout
    ]


def _low_products(x: Tensor, parts: list[_Tensors] | list[Product], draws: list[Draw]) -> list[Tensor | None]:
    """x A^T [T, R] of each linear that has an A."""
    lows: list[Tensor | None] = [None] * len(parts)
    shared = _together(parts, draws)
    if shared:
        low = x @ torch.cat([parts[i].a for i in shared]).to(x.dtype).t()
        for i, piece in zip(shared, low.split([len(parts[i].a) for i in shared], 1), strict=True):
            lows[i] = piece
    for i, (part, draw) in enumerate(zip(parts, draws, strict=True)):
        if draw.dropout:
            lows[i] = (x * draw.kept(x)) @ part.a.to(x.dtype).t()
    return lows


def _low_gradients(gradients: tuple[Tensor, ...], parts: list[_Tensors], draws: list[Draw]) -> list[Tensor | None]:
    """Gradient of x A^T [T, R] of each linear that has an A: the narrow side is multiplied first."""
    return [
        None if part.b is None else (dy @ part.b.to(dy.dtype)).mul_(draw.scale)
        for dy, part, draw in zip(gradients, parts, draws, strict=True)
    ]


def _input_gradient(
    gradients: tuple[Tensor, ...],
    narrow: list[Tensor | None],
    packed: list[PackedWeight | None],
    parts: list[_Tensors],
    draws: list[Draw],
) -> Tensor:
    matrices = [part.weight if matrix is None else matrix for matrix, part in zip(packed, parts, strict=True)]
    shared, beside = _together(parts, draws), None
    if shared:
        stacked = torch.cat([parts[i].a for i in shared])
        beside = LowRankTerm(torch.cat([narrow[i] for i in shared], 1), stacked)
    dx = sum_of_transposed_products(list(gradients), matrices, beside)
    for dlow, part, draw in zip(narrow, parts, draws, strict=True):
        if draw.dropout:
            dx.add_((dlow @ part.a.to(dx.dtype)).mul_(draw.kept(dx)))
    return dx


def _gradients_of_a(
    x: Tensor | None, narrow: list[Tensor | None], parts: list[_Tensors], wanted: list[_Tensors], draws: list[Draw]
) -> list[Tensor | None]:
    """(gradient of x A^T)^T x [R, K] of each A that is trained."""
    found: list[Tensor | None] = [None] * len(parts)
    shared = [i for i in _together(parts, draws) if wanted[i].a]
    if shared:
        together = torch.cat([narrow[i] for i in shared], 1).t() @ x
        for i, piece in zip(shared, together.split([len(parts[i].a) for i in shared]), strict=True):
            found[i] = piece.to(parts[i].a.dtype)
    for i, (part, draw) in enumerate(zip(parts, draws, strict=True)):
        if draw.dropout and wanted[i].a:
            found[i] = (narrow[i].t() @ (x * draw.kept(x))).to(part.a.dtype)
    return found


def column_sums(dy: Tensor) -> Tensor:
    """A bias's gradient: [T, N] -> [N] in fp32 at least, however narrow the activations are."""
    if kernel := kernels.chosen("column_sums", dy.device, dy.dtype):
        return kernel.column_sums(dy)
    return dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))
