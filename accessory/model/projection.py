"""Linears that share an input, each with its base, LoRA and bias, as one autograd function.

It saves neither unpacked matrices nor what can be recomputed, and forms no gradient of a frozen matrix. If only norms
or biases are trained, nothing of x is saved; LoRA saves x (or how to recompute it) and x A^T [T, R].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from accessory import kernels
from accessory.kernels.addition import NOTHING, Addition
from accessory.model.backward_rows import backward_rows, spread
from accessory.model.decoding import decodes
from accessory.model.lora_factors import Factors, factors_of, without_dropout
from accessory.model.recomputable import Recomputable
from accessory.quant import PackedWeight
from accessory.quant.products import Matrix, gradient_product, multiply, scaled_product, sum_of_products


def project(
    x: Tensor | Recomputable, weights: list[Matrix], additions: list[Addition] | None = None, skip_output: bool = False
) -> tuple[Tensor, ...]:
    """x [T, K] -> y [T, N] = x W^T and its addition, for each of `weights` [N, K], in x's dtype.

    weights: packed, or plain in any float dtype, which are cast at each use. additions: one for each; None: nothing is
    added. skip_output: only the backward is needed; y is not filled.
    """
    source = Recomputable.of(x)
    additions = additions or [NOTHING] * len(weights)
    if decodes():
        return _decoded(source.value, weights, additions)
    flat = [*_columns(additions), *(tensor for weight in weights for tensor in _tensors(weight))]
    return _Projection.apply(source.value, source, weights, additions, skip_output, *flat)


def _decoded(x: Tensor, weights: list[Matrix], additions: list[Addition]) -> tuple[Tensor, ...]:
    first, *others = weights
    if isinstance(first, PackedWeight) and not any(addition.dropout for addition in additions):
        decoded = first.decode_products(x, others, additions)
        if decoded is not None:
            return decoded
    factors = factors_of(additions, x.dtype)
    return _products(x, weights, additions, factors, _low_products(x, additions, factors))


def _columns(additions: list[Addition]) -> list[Tensor | None]:
    """[*biases, *A, *B]."""
    return [tensor for kind in zip(*(addition[:3] for addition in additions), strict=True) for tensor in kind]


def _tensors(weight: Matrix) -> list[Tensor]:
    """The tensors of a weight that may be trained."""
    return [getattr(weight, part) for part in weight.trained] if isinstance(weight, PackedWeight) else [weight]


class _Projection(torch.autograd.Function):
    """The backward holds a packed matrix's module, not its tensors: a sharded base is gathered into other memory."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        source: Recomputable,
        weights: list[Matrix],
        additions: list[Addition],
        skip_output: bool,
        *flat: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """flat: the tensors of additions and weights again, where autograd sees them: n biases, n A, n B, and the
        trainable ones of each weight.
        """
        count, rows, factors = len(weights), backward_rows(), factors_of(additions, x.dtype)
        lows = _low_products(x, additions, factors)
        need = ctx.needs_input_grad[5:]
        keeps_x = any(need[count : 2 * count]) or any(need[3 * count :])
        ctx.packed = [weight if isinstance(weight, PackedWeight) else None for weight in weights]
        ctx.settings, ctx.need, ctx.make = [addition[3:] for addition in additions], need, source.make
        ctx.inputs = len(source.inputs) if keeps_x else 0
        ctx.rows, ctx.length, ctx.chosen = rows, len(x), source.chosen
        ctx.factors = factors if x.is_cuda else None  # on a CPU they are made again, because keeping them takes memory
        plain = (weight for weight in weights if isinstance(weight, Tensor))
        kept = lows if rows is None else _chosen(lows, rows)
        ctx.save_for_backward(*source.inputs[: ctx.inputs], *kept, *flat[: 3 * count], *plain)
        if skip_output:
            return tuple(x.new_empty(len(x), weight.shape[0]) for weight in weights)
        return _products(x, weights, additions, factors, lows)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients [T, N] of the outputs -> those of all arguments of `forward` that want one, in their order."""
        count, saved = len(ctx.packed), ctx.saved_tensors
        x = ctx.make(*saved[: ctx.inputs]) if ctx.inputs else None
        end = ctx.inputs + 4 * count
        lows, *of_additions = (saved[i : i + count] for i in range(ctx.inputs, end, count))
        plain = iter(saved[end:])
        weights = [next(plain) if packed is None else packed for packed in ctx.packed]
        additions = [Addition(*tensors, *rest) for *tensors, rest in zip(*of_additions, ctx.settings, strict=True)]
        if ctx.rows is not None:
            gradients = _chosen(gradients, ctx.rows)
            x = x if ctx.chosen or x is None else x[ctx.rows]
        factors = ctx.factors or factors_of(additions, gradients[0].dtype)
        dlows = _low_gradients(gradients, additions, factors)
        dlow = _joined([dlows[i] for i in without_dropout(additions)])
        dx = _input_gradient(gradients, dlow, dlows, weights, additions, factors) if ctx.needs_input_grad[0] else None
        if dx is not None and ctx.rows is not None:
            dx = spread(dx, ctx.rows, ctx.length)
        need_bias, need_a, need_b = (ctx.need[i : i + count] for i in range(0, 3 * count, count))
        return (
            *(dx, None, None, None, None),
            *(kernels.of("column_sums", dy).column_sums(dy).to(added.bias.dtype) if needed else None
              for dy, added, needed in zip(gradients, additions, need_bias, strict=True)),
            *_gradients_of_a(x, dlow, dlows, additions, need_a),
            *(gradient_product(dy.t(), low, added.scale).to(added.b.dtype) if needed else None
              for dy, low, added, needed in zip(gradients, lows, additions, need_b, strict=True)),
            *_gradients_of_weights(x, gradients, weights, ctx.need[3 * count :]),
        )  # fmt: skip


def _chosen(tensors: Sequence[Tensor | None], rows: Tensor) -> list[Tensor | None]:
    """Rows of each; there is no dropout here, whose mask is drawn for all."""
    return [None if tensor is None else tensor[rows] for tensor in tensors]


def _products(
    x: Tensor, weights: list[Matrix], additions: list[Addition], factors: Factors, lows: list[Tensor | None]
) -> tuple[Tensor, ...]:
    """x W^T and its addition [T, N], for each of the weights."""
    used = [addition._replace(b=b) for addition, b in zip(additions, factors.b, strict=True)]
    return tuple(map(multiply, [x] * len(weights), weights, used, lows))


def _joined(parts: list[Tensor]) -> Tensor | None:
    """The given tensors [T, R] side by side."""
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _low_products(x: Tensor, additions: list[Addition], factors: Factors) -> list[Tensor | None]:
    """x A^T [T, R] of each linear that has an A."""
    lows: list[Tensor | None] = [None] * len(additions)
    if shared := without_dropout(additions):
        low = x @ factors.a.to(x.dtype).t()
        for i, piece in zip(shared, low.split([len(additions[i].a) for i in shared], 1), strict=True):
            lows[i] = piece
    for i, addition in enumerate(additions):
        if addition.dropout:
            lows[i] = (x * addition.dropout_mask(x)) @ addition.a.to(x.dtype).t()
    return lows


def _low_gradients(gradients: tuple[Tensor, ...], additions: list[Addition], factors: Factors) -> list[Tensor | None]:
    """The gradient of x A^T [T, R] of each linear that has an A, from which those of x and A are made."""
    return [
        None if b is None else scaled_product(dy, b.to(dy.dtype), addition.scale)
        for dy, addition, b in zip(gradients, additions, factors.b, strict=True)
    ]


def _input_gradient(
    gradients: tuple[Tensor, ...],
    dlow: Tensor | None,
    dlows: list[Tensor | None],
    weights: list[Matrix],
    additions: list[Addition],
    factors: Factors,
) -> Tensor:
    """dlow: those of `dlows` that no dropout is between, side by side."""
    low = None if dlow is None else (dlow, factors.a, 1.0)
    dx = sum_of_products(list(gradients), weights, transposed=True, low=low)
    for dlow, addition in zip(dlows, additions, strict=True):
        if addition.dropout:
            dx.add_((dlow @ addition.a.to(dx.dtype)).mul_(addition.dropout_mask(dx)))
    return dx


def _gradients_of_a(
    x: Tensor | None,
    dlow: Tensor | None,
    dlows: list[Tensor | None],
    additions: list[Addition],
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """(gradient of x A^T)^T x [R, K] of each A that is trained. dlow: as of `_input_gradient`."""
    found: list[Tensor | None] = [None] * len(additions)
    every = without_dropout(additions)
    if shared := [i for i in every if wanted[i]]:
        dlow = dlow if shared == every else _joined([dlows[i] for i in shared])
        together = gradient_product(dlow.t(), x)
        for i, piece in zip(shared, together.split([len(additions[i].a) for i in shared]), strict=True):
            found[i] = piece.to(additions[i].a.dtype)
    for i, addition in enumerate(additions):
        if addition.dropout and wanted[i]:
            found[i] = (dlows[i].t() @ (x * addition.dropout_mask(x))).to(addition.a.dtype)
    return found


def _gradients_of_weights(
    x: Tensor | None, gradients: tuple[Tensor, ...], weights: list[Matrix], wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """dy^T x [N, K] for a plain weight; for a packed one the gradients of its trained parts."""
    found: list[Tensor | None] = []
    for dy, weight in zip(gradients, weights, strict=True):
        count = len(_tensors(weight))
        if not any(wanted[len(found) : len(found) + count]):
            found += [None] * count
        elif isinstance(weight, PackedWeight):
            found += weight.gradients(x, dy)
        else:
            found.append((dy.t() @ x).to(weight.dtype))
    return found
