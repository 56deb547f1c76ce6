"""Attention inside documents, and its backward, in bf16: counterpart of `accessory.model.document_attention`."""

from __future__ import annotations

from ctypes import c_int64
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled


class Documents(NamedTuple):
    """Where documents stand in packed tensors.

    table: int64 [B, 4], the longest first: where the keys of one begin, its tokens, of how many first queries nobody
    reads the result, and the row that its first query has or would have. longest: its tokens. keys: their number.
    order: int64 [keys], the packed row of each key; absent where they stand in that order.
    """

    table: Tensor
    longest: int
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
        table = torch.tensor(entries, dtype=torch.int64).view(-1, 4)
        return Documents(table, max(lengths, default=0), place, order)


def takes(head_dim: int) -> bool:
    """Whether there is a kernel for heads of `head_dim` channels: they are multiplied two at a time."""
    return head_dim % 2 == 0


def forward(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
    """q [T, H, E], k and v [T, K, E], bf16 -> [T, H, E]."""
    q, k, v = (t.contiguous() for t in (q, k, v))
    out = torch.empty_like(q)
    _run("attention_forward", (q, k, v, out), documents, window, scale, backward=False)
    return out


def backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, documents: Documents, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q [T, H, E], and of k and v in the documents' order [keys, K, E]."""
    q, k, v, dout = (t.contiguous() for t in (q, k, v, dout))
    dq, (dk, dv) = torch.empty_like(q), (t.new_empty(documents.keys, *t.shape[1:]) for t in (k, v))
    _run("attention_backward", (q, k, v, dout, dq, dk, dv), documents, window, scale, backward=True)
    return dq, dk, dv


def workspace_bytes(longest: int, head_dim: int, *, backward: bool) -> int:
    """What all threads have for themselves while they attend in documents of up to `longest` tokens."""
    each = compiled("attention_workspace_bytes", "nnb", c_int64)(longest, head_dim, backward)
    return torch.get_num_threads() * each


def _run(
    name: str, tensors: tuple[Tensor, ...], documents: Documents, window: int | None, scale: float, *, backward: bool
) -> None:
    (_, heads, head_dim), kv_heads = tensors[0].shape, tensors[1].shape[1]
    memory = torch.empty(workspace_bytes(documents.longest, head_dim, backward=backward), dtype=torch.uint8)
    compiled(name, "p" * (len(tensors) + 2) + "nnnnnfpn")(
        *(t.data_ptr() for t in tensors), None if documents.order is None else documents.order.data_ptr(),
        documents.table.data_ptr(), len(documents.table), heads, kv_heads, head_dim, window or documents.longest, scale,
        memory.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
