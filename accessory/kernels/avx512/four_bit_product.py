"""Products in bf16 with matrices of 4-bit codes, which are unpacked where they are multiplied and nowhere else."""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_int64
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.avx512.operands import address, check_numbers, made, whole
from accessory.kernels.operands import check_shape

BLOCK = 64  # weights of a row that share a scale
NESTED_BLOCK = 256  # scales that share one of their own


class Codes(NamedTuple):
    """W [n, k]: codes uint8 [n k / 2], high nibble first, whose values `table` fp32 [16] has, and a scale for each 64.

    scales: fp32 [n k / 64], or, with `nested`, uint8: `book[scales] * nested_scales + offset`.
    nested: (book [256], nested_scales, one for each 256 scales, offset [1]), fp32.
    """

    shape: tuple[int, int]
    codes: Tensor
    table: Tensor
    scales: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | None


def takes(shape: tuple[int, int]) -> bool:
    """Whether W [n, k] is multiplied with: blocks of one row, and an even number of rows."""
    return min(shape) > 0 and shape[0] % 2 == 0 and shape[1] % BLOCK == 0


def sum_of_products(
    factors: list[Tensor],
    matrices: list[Codes],
    *,
    turned: bool,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Sum over the matrices of a W^T [T, n], or of a W [T, k] if `turned`; summed in fp32, rounded once.

    factors: the a, bf16 [T, k], or [T, n]. bias: one more summand, [n], or [k]. low: (x bf16 [T, R], plain [n, R], or
    [R, k], scale): x times scale * plain^T, or plain, rounded to bf16 like the weights, is another.

    Raises `AssertionError` for what does not fit together.
    """
    rows, (n, k) = len(factors[0]), matrices[0].shape
    shapes = ((rows, codes.shape[0 if turned else 1]) for codes in matrices)
    if len({codes.shape[1 if turned else 0] for codes in matrices}) > 1:
        raise AssertionError(f"results of unequal widths cannot be summed: {[codes.shape for codes in matrices]}")
    factors = [whole(a, shape, "a factor") for a, shape in zip(factors, shapes, strict=True)]
    terms = (_Term * len(matrices))(*(_term(a, codes) for a, codes in zip(factors, matrices, strict=True)))
    kept = _add_low(terms[-1], *low, rows=rows, turned=turned) if low else ()  # until the call is over
    columns, threads = k if turned else n, torch.get_num_threads()
    out, wide = made((rows, columns)), None if bias is None else _plain(bias, (columns,), "bias")
    memory = _workspace(_bytes(terms, rows, turned, threads))
    compiled("four_bit_product", "pnnbpppn")(
        terms, len(terms), rows, turned, *map(address, (wide, out, memory)), threads
    )
    del kept
    return out


class _Packed(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "table", "scales", "book", "nested_scales", "offset")),
        *((name, c_int64) for name in ("n", "k")),
    )


class _Term(ctypes.Structure):
    _fields_ = (
        ("a", ctypes.c_void_p),
        ("matrix", _Packed),
        ("low", ctypes.c_void_p),
        ("factor", ctypes.c_void_p),
        ("low_step", c_int64),
        ("rank", c_int64),
        ("scale", ctypes.c_float),
    )


def _term(a: Tensor, w: Codes) -> _Term:
    (n, k), nested = w.shape, w.nested is not None
    blocks = n * k // BLOCK
    parts = {
        "codes": whole(w.codes, (n * k // 2,), "codes", torch.uint8),
        "table": whole(w.table, (16,), "table", torch.float32),
        "scales": whole(w.scales, (blocks,), "scales", torch.uint8 if nested else torch.float32),
    }
    if nested:
        shapes = (256,), (-(-blocks // NESTED_BLOCK),), (1,)
        for name, part, shape in zip(("book", "nested_scales", "offset"), w.nested, shapes, strict=True):
            parts[name] = whole(part, shape, name, torch.float32)
    if not all(part.is_contiguous() for part in (w.codes, w.table, w.scales, *(w.nested or ()))):
        raise AssertionError("codes and scales lie in one piece each")  # a copy would be gone before the call
    if not takes(w.shape):
        raise AssertionError(f"a matrix of {list(w.shape)}; expected even rows of whole blocks of {BLOCK}")
    return _Term(address(a), _Packed(n=n, k=k, **{name: address(part) for name, part in parts.items()}))


def _add_low(term: _Term, x: Tensor, plain: Tensor, scale: float, *, rows: int, turned: bool) -> tuple[Tensor, Tensor]:
    """Fill in what `term` lacks; returns what it points to."""
    rank, columns = x.shape[1], term.matrix.k if turned else term.matrix.n
    check_numbers(x, "low")
    check_shape(x, (rows, rank), "low")
    plain = _plain(plain, (rank, columns) if turned else (columns, rank), "low factor")
    if rank % 2:  # two are multiplied at a time
        x, plain = F.pad(x, (0, 1)), F.pad(plain, (0, 0, 0, 1) if turned else (0, 1))
    x = x if x.stride(1) == 1 else x.contiguous()
    term.low, term.factor, term.low_step = address(x), address(plain), x.stride(0)
    term.rank, term.scale = x.shape[1], scale
    return x, plain


def _plain(tensor: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    return whole(tensor.to(torch.float32), shape, name, torch.float32)


def workspace_bytes(shapes: list[tuple[int, int]], rank: int, rows: int, *, turned: bool) -> int:
    """What all threads have for themselves in a sum of products with such matrices [n, k] and `rank` low columns.

    Never less for more rows.
    """
    terms = (_Term * len(shapes))(*(_Term(None, _Packed(*[None] * 6, n, k)) for n, k in shapes))
    terms[-1].rank = rank + rank % 2
    return _bytes(terms, rows, turned, torch.get_num_threads())


def _bytes(terms: ctypes.Array[_Term], rows: int, turned: bool, threads: int) -> int:
    return compiled("four_bit_product_workspace_bytes", "pnnbn", c_int64)(terms, len(terms), rows, turned, threads)


_kept = threading.local()


def _workspace(size: int) -> Tensor:
    """Memory of all threads, kept from call to call: it stays in their caches. Callers' threads have one each."""
    memory = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < size:
        _kept.memory = memory = None  # the old one is gone before there is a new one
        with torch.inference_mode(False):
            memory = _kept.memory = made((size,), torch.uint8)
    return memory
