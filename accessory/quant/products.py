"""Products with plain or packed matrices, and what is added to them.

Small terms are computed first and the rest is added to them: in bf16, a result that is rounded already does not change
when less than half its last digit is added, and most of a new LoRA would be lost. (peft adds to the rounded result; ten
steps on SmolLM2-135M ended 7 % from the losses of fp32.)
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from accessory.kernels.addition import NOTHING, Addition
from accessory.quant.ahead import active
from accessory.quant.packed import PackedWeight, plus_product
from accessory.quant.workspace import unpack_buffer_bytes

Matrix = Tensor | PackedWeight


def multiply(x: Tensor, matrix: Matrix, addition: Addition = NOTHING, low: Tensor | None = None) -> Tensor:
    """x [T, K] -> x W^T and its addition [T, N], in x's dtype. W [N, K] packed, or plain and cast for this use.

    low: x A^T [T, R], x after dropout, if the addition has an A.
    """
    lora = None if low is None else (low, addition.b, addition.scale)
    return sum_of_products([x], [matrix], transposed=False, bias=addition.bias, low=lora)


def sum_of_products(
    factors: list[Tensor],
    matrices: list[Matrix],
    *,
    transposed: bool,
    bias: Tensor | None = None,
    low: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:
    """Sum over the matrices of a W^T [T, N], or of a W [T, K] if `transposed`, in the factors' dtype.

    factors: the a [T, K], or [T, N]. bias: one more summand, [N], or [K]. low: (x [T, R], factor [N, R], or [R, K],
    scale): x times scale * factor^T, or scale * factor, is another.
    """
    like = factors[0]
    if kernel := _kernel(matrices, like.dtype, like.device):
        codes = [matrix.as_codes() for matrix in matrices]
        return kernel.sum_of_products(factors, codes, transposed=transposed, bias=bias, low=low)
    # Added to a large bias, some of LoRA is lost; a small bias added to the rounded sum would lose all its training.
    y = None if bias is None else bias.to(like.dtype)
    if low is not None:
        x, factor, scale = low
        factor = factor.to(x.dtype) if transposed else factor.to(x.dtype).t()
        y = scaled_product(x, factor, scale) if y is None else torch.addmm(y, x, factor, alpha=scale)
    for a, matrix in zip(factors, matrices, strict=True):
        if isinstance(matrix, PackedWeight):
            y = plus_product(y, a, matrix.unpack_to_buffer(a.dtype)) if transposed else matrix.add_product(y, a)
            if (ahead := active()) is not None:
                ahead.look_ahead()
        else:
            w = matrix.to(a.dtype)
            y = plus_product(y, a, w if transposed else w.t())
    return y


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """a [T, K] times b [K, N] times scale -> [T, N], in their dtype."""
    if a.is_cuda:  # a GPU scales before it rounds, in the same pass; a CPU's library would sum in another order
        return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)
    found = a @ b
    return found if scale == 1 else found.mul_(scale)


def gradient_product(a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """The same of a trained fp32 factor's gradient: on a GPU it is not rounded to the factors' narrow dtype first."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        found = torch.mm(a, b, out_dtype=torch.float32)
        return found if scale == 1 else found.mul_(scale)
    return scaled_product(a, b, scale)


def memory_to_multiply(
    matrices: list[Matrix], ranks: list[int], rows: int, dtype: torch.dtype, device: torch.device, *, backward: bool
) -> tuple[int, int]:
    """Peak bytes of (a kernel's workspace, the unpack buffer) over each product.

    ranks: of LoRA in each product; 0 where there is none. backward: whether their input has a gradient, the sum of all
    transposed products.
    """
    calls = [([matrix], rank, False) for matrix, rank in zip(matrices, ranks, strict=True)]
    calls += [(matrices, sum(ranks), True)] if backward else []
    workspace = buffer = 0
    for used, rank, transposed in calls:
        kernel = _kernel(used, dtype, device)
        if kernel is None:
            packed = [matrix for matrix in used if isinstance(matrix, PackedWeight)]
            taken = [
                (m.unpack_bytes(device), m.shape.numel()) if transposed else m.product_bytes(rows, dtype, device)
                for m in packed
            ]
            workspace = max([workspace, *(bytes_ for bytes_, _ in taken)])
            largest = max((numbers for _, numbers in taken), default=0)
            buffer = max(buffer, unpack_buffer_bytes(largest * dtype.itemsize, device))
        else:
            shapes = [matrix.shape for matrix in used]
            workspace = max(workspace, kernel.workspace_bytes(shapes, rank, rows, transposed=transposed))
    return workspace, buffer


def _kernel(matrices: list[Matrix], dtype: torch.dtype, device: torch.device) -> ModuleType | None:
    """The kernel for matrices of formats that have the same one, if they have one."""
    if not all(isinstance(matrix, PackedWeight) for matrix in matrices):
        return None
    find = matrices[0].product_kernel
    return find(matrices, dtype, device) if all(matrix.product_kernel is find for matrix in matrices) else None
