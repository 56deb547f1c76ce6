"""bitsandbytes' functions, loaded without torch's compiler, and its C functions for 4-bit matrices on a CPU.

At import it passes some functions to torch.compile, which loads the whole compiler: almost two seconds of every start,
for functions that are hardly ever called. Here torch.compile waits until one is called.

The C functions are called with memory of ours: its PyTorch operations allocate what they return, which costs a page
fault for every 4 KiB of a large matrix and takes ten times as long as unpacking.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from accessory.kernels.codes import BLOCK, NESTED_BLOCK


def _compile_at_first_call(function: Callable | None = None, **options: Any) -> Callable:
    """`torch.compile`, as a decorator with or without options."""
    if function is None:
        return lambda decorated: _compile_at_first_call(decorated, **options)
    compiled = functools.cache(lambda: _compile(function, **options))

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        """Compile at the first call, then call what was compiled."""
        return compiled()(*given, **named)

    return call


_compile = torch.compile
torch.compile = _compile_at_first_call
try:
    import bitsandbytes.functional as functional  # noqa: F401  others import it from here
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
finally:
    torch.compile = _compile

AVAILABLE = not isinstance(lib, ErrorHandlerMockBNBNativeLibrary)
"""Whether bitsandbytes found its library; without it, its operations do the same in plain PyTorch."""
_SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


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


def unpack_into(out: Tensor, codes: Tensor, scales: Tensor, rows: tuple[int, int], quant_type: str) -> None:
    """Fill `out` with the weights of `codes` uint8 [numel / 2] and `scales` fp32 [numel / 64], all contiguous.

    rows: the matrix's shape, or that of as many weights whose rows are whole blocks.
    """
    function = _UNPACK[quant_type, out.dtype]
    function(codes.data_ptr(), scales.data_ptr(), out.data_ptr(), BLOCK, *rows)


def plain_scales(scales: Tensor, nested_codebook: Tensor, nested_scales: Tensor, offset: Tensor) -> Tensor:
    """The fp32 scales [blocks] of double-quantized ones."""
    if not (AVAILABLE and scales.is_cpu):
        operation = torch.ops.bitsandbytes.dequantize_blockwise.default
        return operation(scales, nested_scales, nested_codebook, NESTED_BLOCK, torch.float32).add_(offset)
    plain = torch.empty(scales.numel())
    given = nested_codebook, scales.contiguous(), nested_scales.contiguous(), plain
    _UNPACK_SCALES(*(tensor.data_ptr() for tensor in given), NESTED_BLOCK, plain.numel())
    return plain.add_(offset)
