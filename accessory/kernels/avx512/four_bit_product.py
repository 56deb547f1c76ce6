"""Products in bf16 with matrices of 4-bit codes, which are unpacked where they are multiplied and nowhere else."""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_int64

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.avx512.four_bit_matrix import Packed, packed, plain, takes
from accessory.kernels.codes import Codes
from accessory.kernels.operands import address, check_numbers, check_shape, contiguous, made


def sum_of_products(
    factors: list[Tensor],
    matrices: list[Codes],
    *,
    transposed: bool,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Sum over the matrices of a W^T [T, n], or of a W [T, k] if `transposed`; summed in fp32, rounded once.

    factors: the a, bf16 [T, k], or [T, n]. bias: one more summand, [n], or [k]. low: (x bf16 [T, R], factor [n, R],
    or [R, k], scale): x times scale * factor^T, or scale * factor, rounded to bf16 like the weights, is another.

    Raises `AssertionError` for what does not fit together.
    """
    rows, (n, k) = len(factors[0]), matrices[0].shape
    shapes = ((rows, codes.shape[0 if transposed else 1]) for codes in matrices)
    if len({codes.shape[1 if transposed else 0] for codes in matrices}) > 1:
        raise AssertionError(f"results of unequal widths cannot be summed: {[codes.shape for codes in matrices]}")
    factors = [contiguous(a, shape, "a factor") for a, shape in zip(factors, shapes, strict=True)]
    given = zip(factors, matrices, strict=True)
    terms = (_Term * len(matrices))(*(_Term(address(a), packed(codes)) for a, codes in given))
    kept = _add_low(terms[-1], *low, rows=rows, transposed=transposed) if low else ()  # until the call is over
    columns, threads = k if transposed else n, torch.get_num_threads()
    out, wide = made((rows, columns)), None if bias is None else plain(bias, (columns,), "bias")
    memory = _workspace(_bytes(terms, rows, transposed, threads))
    compiled("four_bit_product", "pnnbpppn")(
        terms, len(terms), rows, transposed, *map(address, (wide, out, memory)), threads
    )
    del kept
    return out


class _Term(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("matrix", Packed),
        ("low", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("low_step", c_int64),
        ("rank", c_int64),
        ("scale", ctypes.c_float),
    )


def _add_low(
    term: _Term, x: Tensor, factor: Tensor, scale: float, *, rows: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Add the low-rank product to `term`; returns the tensors it points to, for the caller to keep alive."""
    rank, columns = x.shape[1], term.matrix.k if transposed else term.matrix.n
    check_numbers(x, "low")
    check_shape(x, (rows, rank), "low")
    factor = plain(factor, (rank, columns) if transposed else (columns, rank), "low factor")
    if rank % 2:  # two are multiplied at a time
        x, factor = F.pad(x, (0, 1)), F.pad(factor, (0, 0, 0, 1) if transposed else (0, 1))
    x = x if x.stride(1) == 1 else x.contiguous()
    term.low, term.factor, term.low_step = address(x), address(factor), x.stride(0)
    term.rank, term.scale = x.shape[1], scale
    return x, factor


def workspace_bytes(shapes: list[tuple[int, int]], rank: int, rows: int, *, transposed: bool) -> int:
    """Bytes of all threads' workspaces for a sum of products with such matrices [n, k] and low-rank ones of `rank`.

    Never less for more rows.
    """
    terms = (_Term * len(shapes))(*(_Term(None, Packed(*[None] * 6, n, k)) for n, k in shapes))
    terms[-1].rank = rank + rank % 2
    return _bytes(terms, rows, transposed, torch.get_num_threads())


def _bytes(terms: ctypes.Array[_Term], rows: int, transposed: bool, threads: int) -> int:
    return compiled("four_bit_product_workspace_bytes", "pnnbn", c_int64)(terms, len(terms), rows, transposed, threads)


_kept = threading.local()


def _workspace(size: int) -> Tensor:
    """Memory of all threads, kept from call to call, so that it stays in caches. One for each calling thread."""
    memory = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < size:
        _kept.memory = memory = None  # the old one is gone before there is a new one
        with torch.inference_mode(False):
            memory = _kept.memory = made((size,), torch.uint8)
    return memory


__all__ = ["sum_of_products", "takes", "workspace_bytes"]
