"""Causal attention one document after the other, where there is no variable-length kernel: on CPUs, and in fp32.

The forward on a CPU is PyTorch's flash kernel. The backward is our own: on documents of a few hundred tokens the
kernel's takes more than twice as long.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
_PIECE = 512  # queries that attend through a window at once
_BLOCK_SCORES = 1 << 17  # scores, of all heads, that the backward makes at once: they stay in the cache
_FEWEST_ROWS = 96  # of a block, however long the document: below it the products get slow


def attend_by_document(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None = None, scale: float | None = None
) -> Tensor:
    """q [T, H, E], k and v [T, K, E] of documents of `lengths` tokens -> [T, H, E].

    window: how many keys up to its own a query sees; all when absent. scale: of the scores; 1 / sqrt(E) when absent.
    """
    return _AttendByDocument.apply(q, k, v, lengths, window, q.shape[-1] ** -0.5 if scale is None else scale)


class _AttendByDocument(torch.autograd.Function):
    """Keeps q, k, v, the result, and one log-sum a query and head."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None, scale: float
    ) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sums = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        for queries, keys, values, o, s in _documents(lengths, q, k, v, out, sums):
            rows = len(queries) if window is None or window >= len(queries) else min(window, _PIECE)
            for at, seen in _pieces(len(queries), rows, window):
                mask = _band(at, seen, rows, window, q) if at.start else None
                o[at], s[at] = (_flash if q.is_cpu else _softmax)(queries[at], keys[seen], values[seen], mask, scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.lengths, ctx.window, ctx.scale = lengths, window, scale
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        for document in _documents(ctx.lengths, q, k, v, out, sums, dout, dq, dk, dv):
            _fill_gradients(*document, ctx.window, ctx.scale)
        return dq, dk, dv, None, None, None


def _documents(lengths: tuple[int, ...], *packed: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Each document's part of every packed tensor."""
    return zip(*(t.split(lengths) for t in packed), strict=True)


def _pieces(length: int, rows: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """`rows` queries at a time, and the keys that any of them sees."""
    for begin in range(0, length, rows):
        end = min(begin + rows, length)
        yield slice(begin, end), slice(0 if window is None else max(begin - window + 1, 0), end)


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """[S, heads, E] each -> result [S, H, E], and the logarithm of each row's sum of exponentials [S, H]."""
    queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, keys, values, 0.0, mask is None, attn_mask=mask, scale=scale
    )
    return out[0].transpose(0, 1), sums[0].t()


def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The same for other devices, all scores at once: of fp32, whose kernels there give no log-sums."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1).transpose(0, 1) for t in (k, v))
    scores = torch.bmm(q.transpose(0, 1), k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    if mask is None:
        mask = scores.new_full(scores.shape[1:], -torch.inf).triu_(1)
    sums = scores.add_(mask).logsumexp(-1, keepdim=True)
    weights = scores.sub_(sums).exp_().to(q.dtype)
    return torch.bmm(weights, v).transpose(0, 1), sums[..., 0].t()


def _band(at: slice, seen: slice, rows: int, window: int, like: Tensor) -> Tensor:
    """What the queries `at` add to their scores of the keys `seen`: minus infinity where these are too late or old."""
    queries, keys = at.stop - at.start, seen.stop - seen.start
    last = window - 1 + queries
    return _whole_band(rows, window, like.dtype, like.device)[:queries, last - keys : last]


@lru_cache(maxsize=4)
def _whole_band(rows: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, rows + window - 1]: query i sees the keys from i to i + window - 1."""
    seen = torch.ones(rows, rows + window - 1, dtype=torch.bool, device=device).tril(window - 1).triu()
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def _fill_gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, window: int | None, scale: float,
) -> None:  # fmt: skip
    """FlashAttention's backward (Dao et al. 2022, appendix B.2) over blocks of whole rows: fills dq, dk and dv.

    Scores and what is subtracted from one another are computed wide, the other products in the tensors' own dtype. The
    queries that share a key/value head are rows of one matrix.
    """
    length, heads, _ = q.shape
    kv_heads, wide = k.shape[1], sums.dtype
    keys, values = k.transpose(0, 1), v.transpose(0, 1)
    wide_keys, wide_values = (t.to(wide).transpose(1, 2) for t in (keys, values))
    shift = (dout.to(wide) * out.to(wide)).sum(-1)
    blocks = -(-length // max(_BLOCK_SCORES // (heads * length), _FEWEST_ROWS))
    rows = -(-length // blocks)
    # Several blocks add to the same key: in a wide sum.
    dkeys, dvalues = (t.transpose(0, 1).new_zeros(t.transpose(0, 1).shape, dtype=wide) for t in (dk, dv))
    for at, seen in _pieces(length, rows, window):
        queries, douts, lse, delta = (
            _by_kv_head(t[at], kv_heads) for t in (q, dout, sums[..., None], shift[..., None])
        )
        scores = torch.bmm(queries.to(wide), wide_keys[..., seen])
        # Powers of two: PyTorch makes them in a third of the time of powers of e on a CPU.
        weights = _clear_hidden(scores.mul_(scale * LOG2_E).sub_(lse * LOG2_E).exp2_(), at, seen, window)
        narrow = weights.to(q.dtype)
        dvalues[:, seen] += torch.bmm(narrow.transpose(1, 2), douts)
        dscores = torch.bmm(douts.to(wide), wide_values[..., seen]).sub_(delta).mul_(weights).mul_(scale).to(q.dtype)
        dkeys[:, seen] += torch.bmm(dscores.transpose(1, 2), queries)
        dqueries = torch.bmm(dscores, keys[:, seen])
        dq[at] = dqueries.unflatten(1, (heads // kv_heads, -1)).permute(2, 0, 1, 3).flatten(1, 2)
    dk.copy_(dkeys.transpose(0, 1))
    dv.copy_(dvalues.transpose(0, 1))


def _by_kv_head(t: Tensor, kv_heads: int) -> Tensor:
    """[S, H, E] -> [K, H / K * S, E]."""
    return t.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _clear_hidden(weights: Tensor, at: slice, seen: slice, window: int | None) -> Tensor:
    """Zeros for keys behind a query, and for those before its window; `weights` [K, H / K * S, n] is changed."""
    queries, keys = at.stop - at.start, seen.stop - seen.start
    by_head = weights.unflatten(1, (-1, queries)).tril_(keys - queries)
    if window is not None:
        by_head.triu_(keys - queries - window + 1)
    return weights
