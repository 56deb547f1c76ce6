"""Causal attention inside each document, where there is no variable-length kernel: on CPUs, and in fp32.

Documents of about one length are computed together, and of long ones some rows of scores at a time. On a CPU that takes
less time than PyTorch's flash kernel, which wants a call a document.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from accessory.model.document_grid import Group, cut_groups, grid_of, padded, rows_at_once


def attend_by_document(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None = None, scale: float | None = None
) -> Tensor:
    """q [T, H, E], k and v [T, K, E] of documents of `lengths` tokens -> [T, H, E].

    window: how many keys up to its own a query sees; all when absent. scale: of the scores; 1 / sqrt(E) when absent.
    Scores and their softmax are fp32 (fp64 for fp64), products with what comes of them in the tensors' own dtype.
    """
    return _AttendByDocument.apply(q, k, v, lengths, window, q.shape[-1] ** -0.5 if scale is None else scale)


class _AttendByDocument(torch.autograd.Function):
    """Keeps q, k and v; the backward makes the scores again."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.grid, ctx.window, ctx.scale = grid_of(lengths, q.shape[1], q.device), window, scale
        results = []
        for group in ctx.grid.groups:
            queries, keys, values = (group.lay_out(t, k.shape[1]) for t in (q, k, v))
            results.append(_attend(queries, keys[:, 0], values[:, 0], group.rows(q.shape[1]), window, scale))
        return ctx.grid.pack(results)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        found = [_group_gradients(group, q, k, v, dout, ctx.window, ctx.scale) for group in ctx.grid.groups]
        dq, dk, dv = (ctx.grid.pack(parts) for parts in zip(*found, strict=True))
        return dq, dk, dv, None, None, None


def backward_bytes(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> int:
    """Most bytes that the backward has at once beside q, k, v and the result's gradient: for a plan of memory."""
    narrow, wide = (torch.finfo(t).bits // 8 for t in (dtype, torch.promote_types(dtype, torch.float32)))
    lengths = tuple(sorted(lengths, reverse=True))
    shapes = [(end - begin, padded(lengths[begin])) for begin, end in cut_groups(list(lengths), heads)]
    before, moments = 0, []
    for count, longest in shapes:
        rows = rows_at_once(count, longest, heads)
        keys = longest if window is None else min(longest, window - 1 + rows)
        scores, cells = count * heads * rows * keys, count * longest
        laid_out = before + narrow * head_dim * cells * 2 * (heads + kv_heads)
        if rows < longest:  # sums of several blocks, and a block's copies
            laid_out += head_dim * (cells * (narrow * heads + 2 * wide * kv_heads) + 2 * narrow * count * heads * rows)
        key_numbers, query_numbers = count * kv_heads * keys * head_dim, count * heads * rows * head_dim
        dvalues, cast = narrow * key_numbers, narrow if narrow < wide else 0
        moments += [
            laid_out + dvalues + 2 * wide * scores + (wide * (query_numbers + key_numbers) if cast else 0),
            laid_out + dvalues + (3 * wide + cast) * scores,
            laid_out + dvalues + (2 * wide + narrow) * scores + narrow * (query_numbers + key_numbers),
        ]
        before += narrow * head_dim * cells * (heads + 2 * kv_heads)
    laid_out, copies = sum(count * longest for count, longest in shapes), 2 if len(shapes) > 1 else 1
    moments.append(before + narrow * head_dim * heads * (copies * laid_out + sum(lengths)))
    return max(moments)


def _group_gradients(
    group: Group, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the group's queries, keys and values, laid out."""
    queries, keys, values = (group.lay_out(t, k.shape[1]) for t in (q, k, v))
    # What stands in the padding as a query sees keys; it gives no gradient if its result gets none.
    douts = group.lay_out(dout, k.shape[1], pad_with_zeros=True)
    return _gradients(queries, keys[:, 0], values[:, 0], douts, group.rows(q.shape[1]), window, scale)


def _blocks(length: int, rows: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """`rows` queries at a time, and the keys that any of them sees."""
    for begin in range(0, length, rows):
        end = min(begin + rows, length)
        yield slice(begin, end), slice(0 if window is None else max(begin - window + 1, 0), end)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, rows: int, window: int | None, scale: float) -> Tensor:
    """Results [B, R, S, E] of queries [B, R, S, E], keys and values [B, S, E]; `rows` queries at a time."""
    results = torch.empty_like(queries)
    for at, seen in _blocks(queries.shape[2], rows, window):
        weights = _weights(queries[:, :, at], keys[:, seen], window, scale).to(queries.dtype)
        results[:, :, at] = torch.bmm(weights, values[:, seen]).view_as(results[:, :, at])
    return results


def _gradients(
    queries: Tensor, keys: Tensor, values: Tensor, douts: Tensor, rows: int, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries [B, R, S, E], and of keys and values, [B, 1, S, E]."""
    if rows == queries.shape[2]:
        dqueries, dkeys, dvalues = _block_gradients(queries, keys, values, douts, window, scale)
        return dqueries, dkeys[:, None], dvalues[:, None]
    dqueries = torch.empty_like(queries)
    # Several blocks add to the same key: in a wide sum.
    dkeys, dvalues = (torch.zeros_like(t, dtype=_wide(t)) for t in (keys, values))
    for at, seen in _blocks(queries.shape[2], rows, window):
        block = (queries[:, :, at], keys[:, seen], values[:, seen], douts[:, :, at])
        dqueries[:, :, at], dkeys_seen, dvalues_seen = _block_gradients(*block, window, scale)
        dkeys[:, seen] += dkeys_seen
        dvalues[:, seen] += dvalues_seen
    return dqueries, dkeys.to(keys.dtype)[:, None], dvalues.to(values.dtype)[:, None]


def _block_gradients(
    queries: Tensor, keys: Tensor, values: Tensor, douts: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of queries and results [B, R, n, E], the last of the keys and values [B, m, E]; each in its own shape."""
    weights = _weights(queries, keys, window, scale)
    rows, douts = queries.flatten(1, 2), douts.flatten(1, 2)
    dvalues = torch.bmm(weights.to(values.dtype).transpose(1, 2), douts)
    dweights = torch.bmm(douts.to(weights.dtype), values.to(weights.dtype).transpose(1, 2))
    dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype).mul_(scale).to(keys.dtype)
    return torch.bmm(dscores, keys).view_as(queries), torch.bmm(dscores.transpose(1, 2), rows), dvalues


def _weights(queries: Tensor, keys: Tensor, window: int | None, scale: float) -> Tensor:
    """Softmax of the scores of queries [B, R, n, E], the last of the keys [B, m, E] -> [B, R * n, m], wide."""
    wide = _wide(queries)
    scores = torch.bmm((queries.to(wide) * scale).flatten(1, 2), keys.to(wide).transpose(1, 2))
    scores.view(*queries.shape[:3], -1).add_(_hidden(queries.shape[2], keys.shape[1], window, scores))
    return torch.softmax(scores, -1)


def _hidden(queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
    """[queries, keys], the queries being the last: minus infinity for later keys and for those before the window."""
    hidden = like.new_full((queries, keys), -torch.inf).triu_(keys - queries + 1)
    return hidden if window is None else hidden + torch.full_like(hidden, -torch.inf).tril_(keys - queries - window)


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
