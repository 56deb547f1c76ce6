"""Products of a few rows with packed matrices on a GPU, for decoders that `model/decoding_chain.py` cannot compute.

NF4 and FP4 are multiplied by Triton's kernel (one launch for all matrices of an input) or by bitsandbytes' (a launch a
matrix), whole numbers in groups by Triton's. No kernel unpacks a matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.kernels.bitsandbytes_library import functional as _loads_operations  # noqa: F401
from accessory.kernels.codes import BLOCK, Codes, GroupCodes
from accessory.kernels.decoding import MOST_ROWS, Products, filled_up
from accessory.kernels.operands import DTYPES

ALWAYS_FUSED = 4  # rows up to which bitsandbytes multiplies without unpacking on every GPU


Find = Callable[[torch.device, torch.dtype], ModuleType | None]
"""Gives the kernel for a device and a dtype, if there is one."""


class _Added(NamedTuple):
    """What linears that share x add: A [R a linear, K], B [N, R], scaled, both in x's dtype; bias fp32 [N]; or None."""

    a: Tensor | None
    b: Tensor | None
    bias: Tensor | None


class _LaidOut:
    """Biases and LoRA of linears of `widths` that share x [T, columns], joined once for each state of the weights.

    They stay in place, because recorded work reads them there.
    """

    def __init__(self, widths: list[int], columns: int, device: torch.device) -> None:
        self._widths, self._columns, self._device = widths, columns, device
        self._known: tuple[torch.dtype, list[tuple[Tensor | None, int]]] | None = None
        self._added = _Added(None, None, None)

    def of(self, added: list[Addition] | None, dtype: torch.dtype) -> _Added:
        """What is added, as products with x of `dtype` take it."""
        state = [(part, _version(part)) for one in added or [] for part in one[:3]]
        known = self._known is not None and self._known[0] == dtype and len(self._known[1]) == len(state)
        if not known or any(
            part is not held or version != at for (part, version), (held, at) in zip(state, self._known[1], strict=True)
        ):  # fmt: skip
            self._known, self._added = (dtype, state), self._joined(added or [], dtype)
        return self._added

    def forget_trained(self) -> None:
        """Drop what an optimizer may have changed: PyTorch's fused ones do so without raising the tensor's version."""
        if self._known is not None and any(part is not None and part.requires_grad for part, _ in self._known[1]):
            self._known = None

    def _joined(self, added: list[Addition], dtype: torch.dtype) -> _Added:
        rank = filled_up(max((len(one.a) for one in added if one.a is not None), default=0))
        a = b = bias = None
        if rank:
            a = torch.zeros(len(added) * rank, self._columns, dtype=dtype, device=self._device)
            b = torch.zeros(sum(self._widths), rank, dtype=dtype, device=self._device)
            for i, (one, rows) in enumerate(zip(added, b.split(self._widths), strict=True)):
                if one.a is not None:
                    a[i * rank : i * rank + len(one.a)] = one.a
                    rows[:, : len(one.a)] = one.b * one.scale
        if any(one.bias is not None for one in added):
            bias = torch.zeros(sum(self._widths), device=self._device)
            for one, rows in zip(added, bias.split(self._widths), strict=True):
                if one.bias is not None:
                    rows.copy_(one.bias)
        return _Added(a, b, bias)


class JoinedGroups:
    """As `JoinedMatrices`, for whole numbers in groups: only by Triton's kernel, a launch a matrix.

    find: gives Triton's `decoding_groups` for a device and dtype, or None: no product is taken.
    """

    def __init__(
        self, matrices: list[GroupCodes], find: Callable[[torch.device, torch.dtype], ModuleType | None]
    ) -> None:
        self._matrices, self._find, first = matrices, find, matrices[0]
        self._laid_out = _LaidOut([matrix.shape[0] for matrix in matrices], first.shape[1], first.codes.device)

    def forget_trained(self) -> None:
        """Before an answer: see `_LaidOut`."""
        self._laid_out.forget_trained()

    def takes(self, x: Tensor) -> bool:
        """Whether x has few rows on the matrices' device, and the matrices' columns are whole groups of eight."""
        few = 0 < len(x) <= MOST_ROWS and x.device == self._matrices[0].codes.device and x.is_contiguous()
        kernel = self._find(x.device, x.dtype) if few else None
        return kernel is not None and all(map(kernel.takes, self._matrices))

    def multiply(self, x: Tensor, added: list[Addition] | None = None) -> tuple[Tensor, ...]:
        """x [T, k] -> [T, n] of each, with bias and LoRA, no dropout."""
        a, b, bias = self._laid_out.of(added, x.dtype)
        low = None if a is None else (x @ a.t()).float()
        return self._find(x.device, x.dtype).multiply(self._matrices, x, low, b, bias)


class JoinedMatrices:
    """Several W [n, k] that multiply the same x [T, k]: as `accessory.kernels.avx512.packed_gemv.PackedMatrices`.

    find: gives Triton's `decoding_products` for a device and dtype, or None: bitsandbytes' operation is used.
    """

    def __init__(self, matrices: list[Codes], find: Find) -> None:
        self._matrices, self._find = tuple(matrices), find
        self._widths = [matrix.shape[0] for matrix in matrices]
        self._laid_out = _LaidOut(self._widths, matrices[0].shape[1], matrices[0].codes.device)

    @staticmethod
    def can(matrices: list[Codes]) -> bool:
        """Whether the matrices' rows are whole blocks, and their scales of one kind."""
        whole = not any(matrix.shape[1] % BLOCK for matrix in matrices)
        return whole and len({(matrix.nested is None, matrix.quant_type) for matrix in matrices}) == 1

    def forget_trained(self) -> None:
        """Before an answer: see `_LaidOut`."""
        self._laid_out.forget_trained()

    def takes(self, x: Tensor) -> bool:
        """Whether x has few rows on the matrices' device."""
        if not (0 < len(x) <= MOST_ROWS and x.device == self._matrices[0].codes.device and x.is_contiguous()):
            return False
        if self._find(x.device, x.dtype) is not None:
            return True
        return len(x) <= ALWAYS_FUSED and x.dtype in DTYPES and hasattr(torch.ops.bitsandbytes, "gemm_4bit")

    def multiply(self, x: Tensor, added: list[Addition] | None = None) -> tuple[Tensor, ...]:
        """x [T, k] -> [T, n] of each, with bias and LoRA, no dropout."""
        a, b, bias = self._laid_out.of(added, x.dtype)
        low = None if a is None else x @ a.t()
        kernel = self._find(x.device, x.dtype)
        if kernel is None:
            return self._one_by_one(x, low, b, bias)
        products = Products(self._matrices, b=b, bias=bias)
        y, _ = kernel.multiply(products, x, None if low is None else low.float()[:, None])
        return y.split(self._widths, 1)

    def _one_by_one(self, x: Tensor, low: Tensor | None, b: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        absent = [None] * len(self._widths)
        lows = absent if low is None else low.chunk(len(self._widths), 1)
        factors = absent if b is None else b.split(self._widths)
        biases = absent if bias is None else bias.to(x.dtype).split(self._widths)
        return tuple(map(_product, [x] * len(self._widths), self._matrices, lows, factors, biases))


def _product(x: Tensor, w: Codes, low: Tensor | None, b: Tensor | None, bias: Tensor | None) -> Tensor:
    """One product by bitsandbytes. LoRA of a single row goes in as a bias, so that the sum is rounded once."""
    more = None
    if low is not None and len(x) == 1:
        more = (low @ b.t() if bias is None else torch.addmm(bias, low, b.t()))[0]
    elif low is None:
        more = bias
    nested = (None, None, None) if w.nested is None else (w.scales, w.nested[0], w.nested[2].view(()))
    scales = w.scales if w.nested is None else w.nested[1]
    y = torch.ops.bitsandbytes.gemm_4bit(x, w.codes.view(-1, 1), w.shape, scales, BLOCK, w.quant_type, more, *nested)
    if low is not None and len(x) > 1:
        y.addmm_(low, b.t())
        return y if bias is None else y.add_(bias)
    return y


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version
