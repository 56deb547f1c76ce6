"""Products in bf16 with packed matrices, which are unpacked where they are multiplied and nowhere else."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import c_int64
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.operands import address, as_fp32, check_numbers, check_shape, contiguous, made


class Matrix(Protocol):
    """What a format's matrix has, whatever else: W [n, k]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)."""


M = TypeVar("M", bound=Matrix)


class Products(Generic[M]):
    """Sums of products with matrices of a format, by its C functions `name` and `name`_workspace_bytes.

    structure: a matrix in C, with fields n and k. in_c: makes one of a matrix.
    """

    def __init__(self, name: str, structure: type[ctypes.Structure], in_c: Callable[[M], ctypes.Structure]) -> None:
        self._name, self._structure, self._in_c = name, structure, in_c
        kinds = {"a": ctypes.c_void_p, "matrix": structure, "low": ctypes.c_void_p, "factor": ctypes.c_void_p}
        kinds |= {"low_step": c_int64, "rank": c_int64, "scale": ctypes.c_float}
        self._term = type("Term", (ctypes.Structure,), {"_fields_": list(kinds.items())})

    def sum_of_products(
        self,
        factors: list[Tensor],
        matrices: list[M],
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
        if len({matrix.shape[1 if transposed else 0] for matrix in matrices}) > 1:
            raise AssertionError(
                f"results of unequal widths cannot be summed: {[tuple(matrix.shape) for matrix in matrices]}"
            )
        shapes = ((rows, matrix.shape[0 if transposed else 1]) for matrix in matrices)
        factors = [_even(contiguous(a, shape, "a factor")) for a, shape in zip(factors, shapes, strict=True)]
        given = zip(factors, matrices, strict=True)
        terms = (self._term * len(matrices))(*(self._term(address(a), self._in_c(matrix)) for a, matrix in given))
        kept = _add_low(terms[-1], *low, rows=rows, transposed=transposed) if low else ()  # until the call is over
        columns, threads = k if transposed else n, torch.get_num_threads()
        out, wide = made((rows, columns)), None if bias is None else as_fp32(bias, (columns,), "bias")
        memory = _workspace(self._bytes(terms, rows, transposed, threads))
        compiled(self._name, "pnnbpppn")(
            terms, len(terms), rows, transposed, *map(address, (wide, out, memory)), threads
        )
        del kept
        return out

    def workspace_bytes(self, shapes: list[tuple[int, int]], rank: int, rows: int, *, transposed: bool) -> int:
        """Bytes of all threads' workspaces for a sum of products with such matrices [n, k] and low-rank ones of `rank`.

        Never less for more rows.
        """
        terms = (self._term * len(shapes))(*(self._term(None, self._structure(n=n, k=k)) for n, k in shapes))
        terms[-1].rank = rank + rank % 2
        return self._bytes(terms, rows, transposed, torch.get_num_threads())

    def _bytes(self, terms: ctypes.Array, rows: int, transposed: bool, threads: int) -> int:
        return compiled(f"{self._name}_workspace_bytes", "pnnbn", c_int64)(terms, len(terms), rows, transposed, threads)


def _even(a: Tensor) -> Tensor:
    """With a column of zeros, if columns are odd: two are multiplied at a time."""
    return F.pad(a, (0, 1)) if a.shape[1] % 2 else a


def _add_low(
    term: ctypes.Structure, x: Tensor, factor: Tensor, scale: float, *, rows: int, transposed: bool
) -> tuple[Tensor, Tensor]:
    """Add the low-rank product to `term`; returns the tensors it points to, for the caller to keep alive."""
    rank, columns = x.shape[1], term.matrix.k if transposed else term.matrix.n
    check_numbers(x, "low")
    check_shape(x, (rows, rank), "low")
    factor = as_fp32(factor, (rank, columns) if transposed else (columns, rank), "low factor")
    if rank % 2:
        x, factor = _even(x), F.pad(factor, (0, 0, 0, 1) if transposed else (0, 1))
    x = x if x.stride(1) == 1 else x.contiguous()
    term.low, term.factor, term.low_step = address(x), address(factor), x.stride(0)
    term.rank, term.scale = x.shape[1], scale
    return x, factor


_kept = threading.local()


def _workspace(size: int) -> Tensor:
    """Memory of all threads, kept from call to call, so that it stays in caches. One for each calling thread."""
    memory = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < size:
        _kept.memory = memory = None  # the old one is gone before there is a new one
        with torch.inference_mode(False):
            memory = _kept.memory = made((size,), torch.uint8)
    return memory


__all__ = ["Products"]
