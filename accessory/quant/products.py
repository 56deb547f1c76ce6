"""Products with matrices that lie plain or packed, and the additions beside them.

What is small is made first and the base's product added to it, or most of a young LoRA is lost in bf16: a result that
is rounded already does not move when something below half its last digit comes to it; a sum that is rounded once does.
(peft adds to the rounded result; ten steps on SmolLM2-135M ended 7 % from the losses of fp32.)
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.quant.addition import NOTHING, Addition
from accessory.quant.packed import PackedWeight
from accessory.quant.workspace import shared_bytes

Matrix = Tensor | PackedWeight


def multiply(x: Tensor, matrix: Matrix, addition: Addition = NOTHING, low: Tensor | None = None) -> Tensor:
    """x [T, K] -> x W^T and its addition [T, N], in x's dtype. W [N, K] packed, or plain and cast for this use.

    low: x A^T [T, R] as dropout left it, where the addition has an A.
    """
    lora = None if low is None else (low, addition.b, addition.scale)
    fused = _fused([x], [matrix], transposed=False, bias=addition.bias, low=lora)
    if fused is not None:
        return fused
    narrow = None if addition.bias is None else addition.bias.to(x.dtype)
    if low is None:
        return F.linear(x, _borrowed(matrix, x), narrow)
    # Beside a large bias some of LoRA is still lost here; beside the sum, all of a small one's training would be.
    b, scale = addition.b.to(x.dtype).t(), addition.scale
    y = (low @ b).mul_(scale) if narrow is None else torch.addmm(narrow, low, b, alpha=scale)
    return y.addmm_(x, _borrowed(matrix, x).t())


def sum_of_transposed_products(
    dys: list[Tensor], matrices: list[Matrix], low: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Each dy [T, N] times its W [N, K], and low's d [T, R] times A [R, K], summed -> [T, K] in their dtype."""
    fused = _fused(dys, matrices, transposed=True, bias=None, low=low and (*low, 1.0))
    if fused is not None:
        return fused
    dx = None if low is None else low[0] @ low[1].to(low[0].dtype)
    for dy, matrix in zip(dys, matrices, strict=True):
        w = _borrowed(matrix, dy)
        dx = dy @ w if dx is None else dx.addmm_(dy, w)
    return dx


def memory_to_multiply(
    matrices: list[Matrix], ranks: list[int], rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """(a kernel's workspace, what is borrowed into), bytes, of each product, and of the sum of all transposed ones.

    ranks: of the low terms beside them; 0 where there is none.
    """
    products = [([matrix], rank, False) for matrix, rank in zip(matrices, ranks, strict=True)]
    workspace = borrowed = 0
    for together, rank, transposed in [*products, (matrices, sum(ranks), True)]:
        kernel = _kernel(together, dtype, device)
        if kernel is None:
            largest = max((m.shape.numel() for m in together if isinstance(m, PackedWeight)), default=0)
            borrowed = max(borrowed, shared_bytes(largest * dtype.itemsize, device))
        else:
            shapes = [matrix.shape for matrix in together]
            workspace = max(workspace, kernel.workspace_bytes(shapes, rank, rows, transposed=transposed))
    return workspace, borrowed


def _kernel(matrices: list[Matrix], dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """Of matrices that are all of one format, if that has one for them."""
    kind = type(matrices[0])
    if issubclass(kind, PackedWeight) and all(type(matrix) is kind for matrix in matrices):
        return kind.product_kernel(matrices, dtype, device)
    return None


def _fused(
    factors: list[Tensor],
    matrices: list[Matrix],
    *,
    transposed: bool,
    bias: Tensor | None,
    low: tuple[Tensor, Tensor, float] | None,
) -> Tensor | None:
    kernel = _kernel(matrices, factors[0].dtype, factors[0].device)
    codes = kernel and [matrix.as_codes() for matrix in matrices]
    return kernel and kernel.sum_of_products(factors, codes, transposed=transposed, bias=bias, low=low)


def _borrowed(matrix: Matrix, like: Tensor) -> Tensor:
    return matrix.borrow(like.dtype) if isinstance(matrix, PackedWeight) else matrix.to(like.dtype)
