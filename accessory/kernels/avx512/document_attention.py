"""Causal attention inside each document, and its backward, in bf16, by one call."""

from __future__ import annotations

from ctypes import c_int64

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.documents import Documents
from accessory.kernels.operands import address, contiguous, made


def takes(head_dim: int) -> bool:
    """Whether there is a kernel for heads of `head_dim` channels: they are multiplied two at a time."""
    return head_dim % 2 == 0


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None, scale: float | None = None
) -> Tensor:
    """As `accessory.kernels.plain.document_attention.attend`; shared beginnings are read where they are packed."""
    return _Attend.apply(q, k, v, documents, window, q.shape[-1] ** -0.5 if scale is None else scale)


class _Attend(torch.autograd.Function):
    """Saves q, k and v; the backward recomputes the scores."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
        """As the module's `forward`, whose arguments these are."""
        ctx.save_for_backward(q, k, v)
        ctx.documents, ctx.window, ctx.scale = documents, window, scale
        return forward(q, k, v, documents, window, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        """dout, like q -> gradients of q, k and v, as the module's `backward` makes them."""
        dq, dk, dv = backward(*ctx.saved_tensors, dout, ctx.documents, ctx.window, ctx.scale)
        if prefixes := ctx.documents.prefixes:
            dk = prefixes.sum_copies(dk)  # dk's copies are freed before dv's are summed
            dv = prefixes.sum_copies(dv)
        return dq, dk, dv, None, None, None


def backward_bytes(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> int:
    """Peak bytes of the backward beside q, k, v and the result's gradient: for the memory plan."""
    gradients = sum(lengths) * (heads + 2 * kv_heads) * head_dim * dtype.itemsize
    return gradients + workspace_bytes(max(lengths, default=0), head_dim, backward=True)


def forward_bytes(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None = None
) -> int:
    """As the plain kernel's."""
    return workspace_bytes(max(lengths, default=0), head_dim, backward=False)


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
    """q [T, H, E], k and v [T, K, E], bf16 -> [T, H, E]."""
    q, k, v = _checked(q, k, v, documents, window, scale)
    out = made(q.shape)
    _run("attention_forward", (q, k, v, out), documents, window, scale, backward=False)
    return out


def backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, documents: Documents, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, H, E], and of k and v in the documents' order [keys, K, E]."""
    q, k, v = _checked(q, k, v, documents, window, scale)
    dout, dq = contiguous(dout, q.shape, "dout"), made(q.shape)
    dk, dv = (made((documents.keys, *k.shape[1:])) for _ in range(2))
    _run("attention_backward", (q, k, v, dout, dq, dk, dv), documents, window, scale, backward=True)
    return dq, dk, dv


def workspace_bytes(longest: int, head_dim: int, *, backward: bool) -> int:
    """Bytes of all threads' workspaces for documents of up to `longest` tokens."""
    each = compiled("attention_workspace_bytes", "nnb", c_int64)(longest, head_dim, backward)
    return torch.get_num_threads() * each


def _checked(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    (_, heads, head_dim), kv_heads = q.shape, k.shape[1]
    if heads % kv_heads or not takes(head_dim):
        raise AssertionError(f"{heads} heads for {kv_heads} of keys, of {head_dim} channels each")
    if scale < 0 or (window is not None and window < 1):
        raise AssertionError(f"scale {scale}, window {window}; expected no negative scale, and a key at least")
    shape = (documents.rows, kv_heads, head_dim)
    return contiguous(q, (documents.rows, heads, head_dim), "q"), contiguous(k, shape, "k"), contiguous(v, shape, "v")


def _run(
    name: str, tensors: tuple[Tensor, ...], documents: Documents, window: int | None, scale: float, *, backward: bool
) -> None:
    (_, heads, head_dim), kv_heads = tensors[0].shape, tensors[1].shape[1]
    order = documents.prefixes and contiguous(documents.prefixes.whole, (documents.keys,), "order", torch.int64)
    memory = made((workspace_bytes(documents.longest, head_dim, backward=backward),), torch.uint8)
    compiled(name, "p" * (len(tensors) + 2) + "nnnnnfpn")(
        *map(address, (*tensors, order, documents.table)), len(documents.table), heads, kv_heads, head_dim,
        documents.longest if window is None else window, scale, address(memory), torch.get_num_threads(),
    )  # fmt: skip
