"""Causal attention inside each document by one call, where there is a C++ kernel for this CPU (`kernels.avx512`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accessory import kernels
from accessory.kernels.avx512.document_attention import backward, forward, takes, workspace_bytes
from accessory.model.sequences import Sequences


def attends(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is one for queries in `dtype` on `device`."""
    return kernels.chosen("document_attention", device, dtype) is not None and takes(head_dim)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None = None, scale: float | None = None
) -> Tensor:
    """q [T, H, E], k and v [T, K, E] of packed documents -> [T, H, E]; what documents share is read where it stands.

    window: how many keys up to its own a query sees; all when absent. scale: of the scores; 1 / sqrt(E) when absent.
    """
    return _AttendPacked.apply(q, k, v, sequences, window, q.shape[-1] ** -0.5 if scale is None else scale)


def packed_backward_bytes(
    tokens: int, longest: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Most bytes that the backward has at once beside q, k, v and the result's gradient: for a plan of memory."""
    gradients = tokens * (heads + 2 * kv_heads) * head_dim * dtype.itemsize
    return gradients + workspace_bytes(longest, head_dim, backward=True)


class _AttendPacked(torch.autograd.Function):
    """Keeps q, k and v; the backward makes the scores again."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, window: int | None, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.sequences, ctx.window, ctx.scale = sequences, window, scale
        return forward(q, k, v, sequences.documents, window, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk, dv = backward(*ctx.saved_tensors, dout, ctx.sequences.documents, ctx.window, ctx.scale)
        if prefixes := ctx.sequences.prefixes:
            dk = prefixes.sum_copies(dk)  # one is gone before the other's sums are made
            dv = prefixes.sum_copies(dv)
        return dq, dk, dv, None, None, None
