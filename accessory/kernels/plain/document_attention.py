"""Causal attention inside each document: on CUDA by PyTorch's fused kernels. Elsewhere:

Documents of about one length are computed together, and long ones some rows of scores at a time. On a CPU that takes
less time than PyTorch's flash kernel, which needs a call for each document.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accessory.kernels import fused_attention
from accessory.kernels.documents import Documents
from accessory.kernels.fused_attention import fused_on
from accessory.kernels.plain.document_grid import Group, cut_groups, grid_of, padded, rows_at_once

MASKS = 8  # that are cached


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None, scale: float | None = None
) -> Tensor:
    """q [T, H, E], k and v [T, K, E] of packed documents -> [T, H, E], with gradients.

    window: how many keys up to its own a query sees; all when absent. scale: of the scores; 1 / sqrt(E) when absent.
    """
    fused = fused_on(q.device, q.dtype, q.shape[-1]) if documents.keys else None
    kernel = by_document if fused is None else partial(fused_attention.attend, fused)
    prefixes = documents.prefixes
    if prefixes is None:
        return kernel(q, k, v, documents, window, scale)
    return prefixes.pack(kernel(*(prefixes.lay_out(t) for t in (q, k, v)), documents, window, scale))


def by_document(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float | None
) -> Tensor:
    """The same of whole documents, on any device and in any dtype."""
    return _AttendByDocument.apply(q, k, v, documents, window, scale)


class _AttendByDocument(torch.autograd.Function):
    """Of whole documents; the results of shared queries are undefined, and their gradients must be zero.

    Scores and their softmax are fp32 (fp64 for fp64), products with them in the tensors' own dtype. Saves q, k and v;
    the backward recomputes the scores.
    """

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float | None
    ) -> Tensor:
        """q [T, H, E], k and v [T, K, E] -> [T, H, E], in q's dtype."""
        ctx.save_for_backward(q, k, v)
        ctx.grid = grid_of(documents.lengths, q.shape[1], k.shape[1], q.device, documents.shared)
        ctx.window, ctx.scale = window, q.shape[-1] ** -0.5 if scale is None else scale
        whole, results = ctx.grid.empty(q)
        for group, result in zip(ctx.grid.groups, results, strict=True):
            _GroupAttention(group, q, k, v, window, ctx.scale).fill(result)
        return ctx.grid.pack(whole, q.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        """dout [T, H, E] -> gradients of q, k and v, of their shapes and dtypes."""
        given = ctx.saved_tensors
        wholes, parts = zip(*(ctx.grid.empty(t) for t in given), strict=True)
        for group, dqueries, dkeys, dvalues in zip(ctx.grid.groups, *parts, strict=True):
            attention = _GroupAttention(group, *given, ctx.window, ctx.scale)
            # A padding query sees keys; it adds nothing to their gradients if its result's gradient is zero.
            douts = group.lay_out(dout, pad_with_zeros=True)
            attention.fill_gradients(douts, dqueries, dkeys[:, 0], dvalues[:, 0])
            del attention, douts  # before the next group's
        packed = (ctx.grid.pack(whole, t.shape[1]) for whole, t in zip(wholes, given, strict=True))
        return *packed, None, None, None


def backward_bytes(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> int:
    """Peak bytes of the backward beside q, k, v and the result's gradient: for the memory plan.

    Of whole documents: skipped queries have no scores.
    """
    narrow, wide = _widths(dtype)
    shapes = _group_shapes(lengths, heads)
    cells = sum(count * longest for count, longest in shapes)
    found, moments = narrow * head_dim * cells * (heads + 2 * kv_heads), []
    for count, longest in shapes:
        rows = rows_at_once(count, longest, heads)
        keys = longest if window is None else min(longest, window - 1 + rows)
        scores, key_numbers = count * heads * rows * keys, count * kv_heads * keys * head_dim
        query_numbers = count * heads * rows * head_dim
        before = found + head_dim * count * longest * (narrow * 2 * (heads + kv_heads) + 2 * wide * kv_heads)
        if rows < longest:  # sums of several blocks, and a block's copies and results
            before += 2 * wide * head_dim * count * longest * kv_heads
            before += narrow * (3 * query_numbers + 2 * key_numbers)
        before += wide * rows * (rows if window is None else min(longest // rows, MASKS) * keys)
        cast = narrow < wide
        moments += [
            before + 2 * wide * scores + wide * query_numbers * cast,
            before + (3 * wide + narrow * cast) * scores,
        ]
    moments.append(found + narrow * head_dim * sum(lengths) * (heads + 2 * kv_heads))
    return max(moments)


def forward_bytes(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> int:
    """Peak bytes of a forward that saves nothing, beside q, k, v and the result: for the memory plan."""
    narrow, wide = _widths(dtype)
    shapes = _group_shapes(lengths, heads)
    found, most = narrow * head_dim * heads * sum(count * longest for count, longest in shapes), 0
    for count, longest in shapes:
        rows = rows_at_once(count, longest, heads)
        keys = longest if window is None else min(longest, window - 1 + rows)
        laid_out = head_dim * count * longest * (narrow * (heads + 2 * kv_heads) + wide * kv_heads)
        scores, cast = count * heads * rows * keys, count * heads * rows * head_dim * (narrow < wide)
        most = max(most, laid_out + wide * (scores + max(scores, cast)))
    return found + most


def _widths(dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a number of `dtype`, and of one that is fp32 at least."""
    return dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize


def _group_shapes(lengths: tuple[int, ...], heads: int) -> list[tuple[int, int]]:
    """(documents, padded length) of each group."""
    ordered = sorted(lengths, reverse=True)
    return [(end - begin, padded(ordered[begin])) for begin, end in cut_groups(ordered, heads)]


class _GroupAttention:
    """Attention of `group` in packed q [T, H, E], k and v [T, K, E], some queries at a time.

    queries [B, R, S, E]; keys and values [B, S, E]: B documents times key/value heads, R query heads of each.
    """

    def __init__(self, group: Group, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> None:
        self.queries = group.lay_out(q)
        self.keys, self.values = (group.lay_out(t)[:, 0] for t in (k, v))
        self.rows = rows_at_once(group.count, group.longest, group.heads, group.skipped)
        self.skipped, self.window = group.skipped, window
        # Keys and values are scaled instead of scores and their gradients, because they are fewer.
        self.scale, self.scaled_keys = scale, self.keys.to(torch.promote_types(q.dtype, torch.float32)) * scale

    @cached_property
    def scaled_values(self) -> Tensor:
        """In fp32 at least; for the backward."""
        return self.values.to(self.scaled_keys.dtype) * self.scale

    def fill(self, result: Tensor) -> None:
        """Fill `result` [B, R, S, E], except for skipped queries."""
        for at, seen in self._blocks():
            weights = self._weights(at, seen).to(result.dtype)
            block = result[:, :, at]
            block.copy_(torch.bmm(weights, self.values[:, seen]).view_as(block))

    def fill_gradients(self, douts: Tensor, dqueries: Tensor, dkeys: Tensor, dvalues: Tensor) -> None:
        """Fill the last three, shaped as queries, keys and values; `douts` is shaped as the result."""
        if self.rows == self.queries.shape[2]:
            everything = slice(None), slice(None)
            self._fill_block(*everything, douts, dqueries.flatten(1, 2), dkeys, dvalues)
            return
        dqueries[:, :, : self.skipped] = 0
        # Several blocks add to the same key, in fp32 at least.
        sums = [torch.zeros_like(t) for t in (self.scaled_keys, self.scaled_values)]
        for at, seen in self._blocks():
            block = dqueries[:, :, at]
            found = [torch.empty_like(t) for t in (block.flatten(1, 2), self.keys[:, seen], self.values[:, seen])]
            self._fill_block(at, seen, douts[:, :, at], *found)
            block.copy_(found[0].view_as(block))
            for total, part in zip(sums, found[1:], strict=True):
                total[:, seen] += part
        dkeys.copy_(sums[0])
        dvalues.copy_(sums[1])

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """`rows` queries at a time, without skipped ones, and the keys that any of them sees."""
        length = self.queries.shape[2]
        for begin in range(self.skipped, length, self.rows):
            end = min(begin + self.rows, length)
            yield slice(begin, end), slice(0 if self.window is None else max(begin - self.window + 1, 0), end)

    def _fill_block(
        self, at: slice, seen: slice, douts: Tensor, dqueries: Tensor, dkeys: Tensor, dvalues: Tensor
    ) -> None:
        """Gradients of n queries, whose results have `douts` [B, R, n, E], and of the m keys that they see.

        Fills the last three, [B, R * n, E] and [B, m, E].
        """
        weights = self._weights(at, seen)
        rows, douts = self.queries[:, :, at].flatten(1, 2), douts.flatten(1, 2)
        torch.bmm(weights.to(douts.dtype).transpose(1, 2), douts, out=dvalues)
        dweights = torch.bmm(douts.to(weights.dtype), self.scaled_values[:, seen].transpose(1, 2))
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).to(douts.dtype)
        torch.bmm(dscores, self.keys[:, seen], out=dqueries)
        torch.bmm(dscores.transpose(1, 2), rows, out=dkeys)

    def _weights(self, at: slice, seen: slice) -> Tensor:
        """Softmax of the scores of n queries, the last of the m keys that they see: [B, R * n, m], wide."""
        queries, keys = self.queries[:, :, at], self.scaled_keys[:, seen]
        scores = torch.bmm(queries.to(keys.dtype).flatten(1, 2), keys.transpose(1, 2))
        last = queries.shape[2] if self.window is None else keys.shape[1]  # all queries see the keys before theirs
        hidden = _hidden(queries.shape[2], last, self.window, scores.dtype, scores.device)
        scores.view(*queries.shape[:3], -1)[..., -last:].add_(hidden)
        return torch.softmax(scores, -1)


@lru_cache(maxsize=MASKS)
def _hidden(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask [queries, keys] of the last queries: minus infinity for later keys and for those before the window.

    All layers share the cached ones.
    """
    nothing = torch.full((queries, keys), -torch.inf, dtype=dtype, device=device)
    hidden = nothing.triu(keys - queries + 1)
    return hidden if window is None else hidden + nothing.tril_(keys - queries - window)
