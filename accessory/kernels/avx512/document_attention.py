"""Attention inside documents, and its backward, in bf16: counterpart of `accessory.model.document_attention`."""

from __future__ import annotations

from ctypes import c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.avx512.operands import address, made, whole


class Documents(NamedTuple):
    """Where documents stand in packed tensors.

    table: int64 [B, 4], the longest first: where the keys of one begin, its tokens, of how many first queries nobody
    reads the result, and the row that its first query has or would have. longest: its tokens. rows, keys: how many
    are packed, and of all documents. order: int64 [keys], the row of each key; absent where they stand in that order.
    """

    table: Tensor
    longest: int
    rows: int
    keys: int
    order: Tensor | None

    @staticmethod
    def build(lengths: tuple[int, ...], shared: tuple[int, ...], order: Tensor | None) -> Documents:
        """Of documents of `lengths` tokens, the first `shared` of each being packed with the one before it alone."""
        place = row = 0
        entries = []
        for length, known in zip(lengths, shared, strict=True):
            entries.append((place, length, known, row - known))
            place += length
            row += length - known
        entries.sort(key=lambda entry: -entry[1])
        table = torch.tensor(entries, dtype=torch.int64, device="cpu").view(-1, 4)
        order = None if order is None else whole(order, (place,), "order", torch.int64)
        return Documents(table, max(lengths, default=0), row, place, order)


def takes(head_dim: int) -> bool:
    """Whether there is a kernel for heads of `head_dim` channels: they are multiplied two at a time."""
    return head_dim % 2 == 0


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
    dout, dq = whole(dout, q.shape, "dout"), made(q.shape)
    dk, dv = (made((documents.keys, *k.shape[1:])) for _ in range(2))
    _run("attention_backward", (q, k, v, dout, dq, dk, dv), documents, window, scale, backward=True)
    return dq, dk, dv


def workspace_bytes(longest: int, head_dim: int, *, backward: bool) -> int:
    """What all threads have for themselves while they attend in documents of up to `longest` tokens."""
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
    return whole(q, (documents.rows, heads, head_dim), "q"), whole(k, shape, "k"), whole(v, shape, "v")


def _run(
    name: str, tensors: tuple[Tensor, ...], documents: Documents, window: int | None, scale: float, *, backward: bool
) -> None:
    (_, heads, head_dim), kv_heads = tensors[0].shape, tensors[1].shape[1]
    memory = made((workspace_bytes(documents.longest, head_dim, backward=backward),), torch.uint8)
    compiled(name, "p" * (len(tensors) + 2) + "nnnnnfpn")(
        *map(address, (*tensors, documents.order, documents.table)), len(documents.table), heads, kv_heads, head_dim,
        documents.longest if window is None else window, scale, address(memory), torch.get_num_threads(),
    )  # fmt: skip
