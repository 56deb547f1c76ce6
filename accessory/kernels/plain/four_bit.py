"""NF4 and FP4 dequantization (Dettmers et al. 2023), by bitsandbytes' operations."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels import bitsandbytes_library as native
from accessory.kernels.codes import BLOCK, Codes


def dequantize(w: Codes, out: Tensor) -> Tensor:
    """Fill `out` [n, k], contiguous, with W in its dtype; returns it."""
    if out.dtype == torch.float64:  # which bitsandbytes does not know
        return out.copy_(dequantize(w, torch.empty_like(out, dtype=torch.float32)))
    scales = w.scales if w.nested is None else native.plain_scales(w.scales, *w.nested)
    if native.AVAILABLE and w.codes.is_cpu:
        native.unpack_into(out, w.codes, scales, _whole_blocks(w.shape), w.quant_type)
        return out
    operation, given = torch.ops.bitsandbytes.dequantize_4bit, (w.codes.view(-1, 1), scales, BLOCK, w.quant_type)
    if w.codes.is_cuda:
        operation.out(*given, w.shape, out.dtype, out=out)
        return out
    return out.copy_(operation.default(*given, _whole_blocks(w.shape), out.dtype).view(w.shape))


def _whole_blocks(shape: tuple[int, int]) -> tuple[int, int]:
    """A shape with as many numbers whose rows are whole blocks.

    On the CPU bitsandbytes 0.50.2 begins a new block with every row when it unpacks, though it packs across rows.
    """
    n, k = shape
    if k % BLOCK == 0:
        return n, k
    return (n * k // BLOCK, BLOCK) if n * k % BLOCK == 0 else (1, n * k)
