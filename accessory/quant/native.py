"""bitsandbytes' C functions for 4-bit matrices on a CPU, working in memory of ours.

Its operations allocate what they return. Fresh memory of a large matrix costs a page fault for every 4 KiB, ten times
what unpacking costs; and a product with one row takes less time than an operation's way through torch's dispatcher.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from accessory.quant.bitsandbytes_library import ErrorHandlerMockBNBNativeLibrary, functional, lib

AVAILABLE = not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
"""Whether bitsandbytes found its library; without it, its operations do the same in plain PyTorch."""
FUSES = AVAILABLE and bool(functional.has_avx512bf16())
"""Whether this processor has what the product with packed weights is written for."""
FUSED_ROWS, FUSED_COLUMNS = 32, 64
"""The product takes matrices whose rows and columns are multiples of these."""
_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = tuple(_SUFFIX)
"""What codes unpack to."""


def _declared(name: str, argument_types: list[type]) -> ctypes._CFuncPtr:
    function = getattr(_library, name)
    function.argtypes, function.restype = argument_types, None
    return function


if AVAILABLE:
    _library = ctypes.CDLL(lib._lib._name)  # a handle of ours: declaring types on bitsandbytes' would change its calls
    _UNPACK = {
        (quant_type, dtype): _declared(
            f"cdequantize_blockwise_cpu_{quant_type}_{suffix}", [c_void_p] * 3 + [c_int64] * 3
        )
        for quant_type in ("nf4", "fp4")
        for dtype, suffix in _SUFFIX.items()
    }
    _UNPACK_SCALES = _declared("cdequantize_blockwise_cpu_fp32", [c_void_p] * 4 + [c_int64] * 2)
if FUSES:
    _PRODUCT = {
        quant_type: _declared(
            f"gemv_4bit_inference_cpu_{quant_type}_bf16", [c_int64] * 3 + [c_void_p] * 4 + [c_int64] * 3
        )
        for quant_type in ("nf4", "fp4")
    }


def unpack_into(out: Tensor, codes: Tensor, scales: Tensor, block: int, quant_type: str) -> None:
    """Fill `out` [N, K] with the weights of `codes` uint8 [N*K/2] and `scales` fp32 [N*K/block], all contiguous."""
    function = _UNPACK[quant_type, out.dtype]
    function(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), block, *out.shape)


def unpack_scales_into(out: Tensor, scales: Tensor, nested_scales: Tensor, codebook: Tensor, block: int) -> None:
    """Fill `out` fp32 [blocks] with `codebook[scales] * nested_scales`, one of the latter for every `block`."""
    addresses = (tensor.data_ptr() for tensor in (codebook, scales, nested_scales, out))
    _UNPACK_SCALES(*addresses, block, out.numel())


def fused_product(x: Tensor, codes: Tensor, scales: Tensor, block: int, quant_type: str) -> Tensor:
    """x [T, K] bf16 -> x W^T [T, N] bf16; codes [N, K/2] and scales bf16 [K/block, N] as `FusedCopy` lays them out."""
    (rows, k), n = x.shape, codes.shape[0]
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(rows, n)
    _PRODUCT[quant_type](
        rows, n, k, x.data_ptr(), codes.data_ptr(), scales.data_ptr(), out.data_ptr(), block, x.stride(0), n
    )
    return out
