"""Attention of one new token a document to a key/value cache, in bf16: softmax and sums in fp32, rounded once."""

from __future__ import annotations

from ctypes import c_int64

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.operands import address, contiguous


def takes(each: int) -> bool:
    """Whether documents have one new token `each`."""
    return each == 1


def attend(
    q: Tensor, keys: Tensor, values: Tensor, counts: tuple[int, ...], window: int | None, scale: float
) -> Tensor:
    """As `accessory.kernels.plain.cached_attention.attend`, in bf16, of one token and at least one key a document.

    Raises `AssertionError` for what does not fit together.
    """
    (documents, longest, kv_heads, width), heads = keys.shape, q.shape[1]
    q, values = contiguous(q, (documents, heads, width), "q"), contiguous(values, keys.shape, "values")
    keys = contiguous(keys, keys.shape, "keys")
    if heads % kv_heads:
        raise AssertionError(f"{heads} heads for {kv_heads} of keys")
    if scale < 0 or (window is not None and window < 1):
        raise AssertionError(f"scale {scale}, window {window}; expected no negative scale, and a key at least")
    if len(counts) != documents or not all(0 < count <= longest for count in counts):
        raise AssertionError(f"keys {counts}; expected {documents}, of 1 to {longest}")
    out = torch.empty_like(q)
    compiled("cached_attention", "pppppnnnnnnfn")(
        *map(address, (q, keys, values, out)), (c_int64 * documents)(*counts), documents, longest, heads, kv_heads,
        width, longest if window is None else window, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out
