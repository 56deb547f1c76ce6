"""The tensor-parallel linear: a product with a weight, what the method adds to it, and the communication around it.

The three know nothing of each other: `weight` is a plain parameter or a packed one (`accessory.quant`), `addition` is
whatever a method put there (`accessory.method`), and `cut` says which dimension of the matrix the ranks share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from accessory.parallel.tensor import WHOLE, Slicing, mark, reduce_from_model_parallel_region
from accessory.quant import PackedWeight

Cut = Literal["column", "row"]


class Linear(nn.Module):
    """This rank's part of y = x W^T + b, with W [out_features, in_features] cut by columns or rows (Megatron's terms).

    column: x [T, in] whole -> y [T, out / ranks]. The caller passes x through `copy_to_model_parallel_region`, once for
    all linears that share it. row: x [T, in / ranks] -> y [T, out] whole, summed over the ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        cut: Cut,
        ranks: int,
        bias: bool,
        dtype: torch.dtype,
        storage: Callable[[tuple[int, int]], PackedWeight] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.cut, self.ranks = in_features, out_features, cut, ranks
        shape = (out_features // ranks, in_features) if cut == "column" else (out_features, in_features // ranks)
        if storage:
            self.weight = storage(shape)
            self.weight.slicing = self.weight_slicing
        else:
            self.weight = mark(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")), self.weight_slicing)
        self.register_parameter("bias", None)
        if bias:
            self.add_bias(dtype)
        self.addition: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def weight_slicing(self) -> Slicing:
        """How W is cut."""
        return Slicing(dim=0 if self.cut == "column" else 1)

    def keep_plain(self, dtype: torch.dtype) -> None:
        """Hold W as plain numbers of `dtype`, whatever the storage of the others."""
        shape = tuple(self.weight.shape)
        del self.weight
        self.weight = mark(nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")), self.weight_slicing)

    def add_bias(self, dtype: torch.dtype) -> None:
        """Give the layer a bias in `dtype`: a column layer cuts it with the rows of W, a row layer adds it whole."""
        size = self.out_features // self.ranks if self.cut == "column" else self.out_features
        slicing = Slicing(dim=0) if self.cut == "column" else WHOLE
        self.bias = mark(nn.Parameter(torch.empty(size, dtype=dtype, device="meta")), slicing)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, this rank's inputs] -> y [T, this rank's outputs], in x's dtype."""
        y = self.weight(x) if isinstance(self.weight, PackedWeight) else plain_product(x, self.weight)
        if self.addition is not None:
            y = self.addition(x, y)
        if self.cut == "row":
            y = reduce_from_model_parallel_region(y)
        return y if self.bias is None else _AddBias.apply(y, self.bias)


def plain_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, in] -> x W^T [T, out] in x's dtype. A wider W (an fp32 master) is cast for each use and never kept cast."""
    return F.linear(x, weight) if weight.dtype == x.dtype else _CastProduct.apply(x, weight)


class _CastProduct(torch.autograd.Function):
    """Keeps the master weight for the backward instead of its narrow copy, which would double as an activation."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
        return dx, (dy.t() @ x).to(weight.dtype) if ctx.needs_input_grad[1] else None


class _AddBias(torch.autograd.Function):
    """y += b in place; the bias gradient is summed in fp32 however narrow the activations are."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_dtype = bias.dtype
        ctx.mark_dirty(y)
        return y.add_(bias.to(y.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = torch.promote_types(dy.dtype, torch.float32)
        return dy, dy.sum(0, dtype=wide).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
