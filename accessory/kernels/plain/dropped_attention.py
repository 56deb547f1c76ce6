"""Causal attention inside each document, some of whose weights are dropped: fused kernels for packed documents cannot.

One document and key/value head at a time, in fp32 at least. The backward draws the same random numbers again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accessory.kernels.documents import Documents


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    window: int | None,
    scale: float | None,
    dropout: float,
    seed: int,
) -> Tensor:
    """q [T, H, E], k and v [T, K, E] of packed documents -> [T, H, E], with gradients.

    dropout: share of the weights (after the softmax) that become 0; the others are divided by 1 - dropout. seed:
    chooses them. window, scale: as `document_attention.attend`. Documents must not share beginnings.
    """
    if documents.prefixes is not None:
        raise AssertionError("documents that share a beginning would share what is dropped of it")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _DroppedAttention.apply(q, k, v, documents.lengths, window, scale, dropout, seed)


def kept_weights(
    lengths: tuple[int, ...], heads: int, kv_heads: int, dropout: float, seed: int, device: torch.device
) -> Iterator[Tensor]:
    """What is kept, bool [H / K, S, S] for each document and key/value head, in the order they are computed in."""
    generator = torch.Generator(device).manual_seed(seed)
    for length in lengths:
        for _ in range(kv_heads):
            shape = heads // kv_heads, length, length
            yield torch.rand(shape, generator=generator, device=device) >= dropout


class _DroppedAttention(torch.autograd.Function):
    """Saves q, k and v."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        window: int | None,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        """q [T, H, E], k and v [T, K, E] -> [T, H, E], in q's dtype; `seed` is that of what is dropped."""
        ctx.save_for_backward(q, k, v)
        ctx.how = lengths, window, scale, dropout, seed
        out = torch.empty_like(q)
        for at, heads, head, kept in _pieces(q, k, lengths, dropout, seed):
            queries, keys, values = _wide(q[at, heads].transpose(0, 1), k[at, head], v[at, head])
            # Without a name for the weights, none outlive their document.
            out[at, heads] = (_weights(queries, keys, window, scale).mul_(kept).div_(1 - dropout) @ values).transpose(
                0, 1
            )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        """dout [T, H, E] -> gradients of q, k and v, of their shapes and dtypes."""
        q, k, v = ctx.saved_tensors
        lengths, window, scale, dropout, seed = ctx.how
        dq, dk, dv = map(torch.empty_like, (q, k, v))
        for at, heads, head, kept in _pieces(q, k, lengths, dropout, seed):
            queries, keys, values = _wide(q[at, heads].transpose(0, 1), k[at, head], v[at, head])
            (given,) = _wide(dout[at, heads].transpose(0, 1))
            weights = _weights(queries, keys, window, scale)
            dweights = (given @ values.t()).mul_(kept).div_(1 - dropout)
            dv[at, head] = ((weights * kept).transpose(1, 2) @ given).sum(0).div_(1 - dropout)
            dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
            del weights, dweights
            dq[at, heads] = (dscores @ keys).mul_(scale).transpose(0, 1)
            dk[at, head] = (dscores.transpose(1, 2) @ queries).sum(0).mul_(scale)
            del dscores
        return dq, dk, dv, None, None, None, None, None


def _pieces(
    q: Tensor, k: Tensor, lengths: tuple[int, ...], dropout: float, seed: int
) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """Tokens of each document, query heads of each key/value head, that head, and what is kept of their weights."""
    kept = kept_weights(lengths, q.shape[1], k.shape[1], dropout, seed, q.device)
    begin, each = 0, q.shape[1] // k.shape[1]
    for length in lengths:
        for head in range(k.shape[1]):
            yield slice(begin, begin + length), slice(head * each, (head + 1) * each), head, next(kept)
        begin += length


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _weights(queries: Tensor, keys: Tensor, window: int | None, scale: float) -> Tensor:
    """Softmax of the scores of [R, S, E] queries and [S, E] keys: [R, S, S]."""
    length = len(keys)
    seen = torch.ones(length, length, dtype=torch.bool, device=keys.device).tril_()
    seen = seen if window is None else seen.triu_(1 - window)
    return torch.softmax((queries @ keys.t()).mul_(scale).masked_fill_(~seen, -torch.inf), -1)


def forward_bytes(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> int:
    """Peak bytes of the forward, beside q, k, v and the result: for the memory plan."""
    wide, longest, each = torch.promote_types(dtype, torch.float32).itemsize, max(lengths), heads // kv_heads
    cast = wide * head_dim * longest * (each + 2) * (wide > dtype.itemsize)
    return each * longest**2 * (2 * wide + 1) + longest**2 + cast


def backward_bytes(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> int:
    """Peak bytes of the backward beside q, k, v and the result's gradient: for the memory plan."""
    wide, longest, each = torch.promote_types(dtype, torch.float32).itemsize, max(lengths), heads // kv_heads
    gradients = dtype.itemsize * head_dim * sum(lengths) * (heads + 2 * kv_heads)
    cast = wide * head_dim * longest * (2 * each + 2) * (wide > dtype.itemsize)
    return gradients + each * longest**2 * (4 * wide + 1) + cast
