"""The tensor-parallel linear: a product with a weight, what the method adds to it, and the communication around it.

The three know nothing of each other: `weight` is a plain parameter or a packed one (`accessory.quant`), `low_rank` and
`bias` are whatever a method put there (`accessory.method`), and `cut` says which dimension of the matrix the ranks
share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from accessory.model.low_rank import LowRank
from accessory.model.projection import Product, column_sums, project
from accessory.model.recomputed import Recomputed, runs_again
from accessory.parallel.tensor import (
    WHOLE,
    Slicing,
    copy_to_model_parallel_region,
    mark,
    reduce_from_model_parallel_region,
)
from accessory.quant import PackedWeight

Cut = Literal["column", "row"]


class Linear(nn.Module):
    """This rank's part of y = x W^T + b, with W [out_features, in_features] cut by columns or rows (Megatron's terms).

    column: x [T, in] whole -> y [T, out / ranks]; those that share an x are called together, by `project_columns`.
    row: x [T, in / ranks] -> y [T, out] whole, summed over the ranks; called by itself.
    `ends_block`: of y nothing is made but the block's result, so it is not computed when the block is run again.
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
        self.low_rank: LowRank | None = None
        self.ends_block = False

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

    def product(self, bias: Tensor | None) -> Product:
        """What one forward multiplies with and adds."""
        if self.low_rank is None:
            return Product(self.weight, bias)
        low_rank = self.low_rank
        return Product(self.weight, bias, low_rank.a.weight, low_rank.b.weight, low_rank.draw())

    def forward(self, x: Tensor | Recomputed) -> Tensor:
        """A row layer: x [T, in / ranks] -> y [T, out], in x's dtype."""
        unread = self.ends_block and runs_again()
        if self.ranks == 1:
            return project(x, [self.product(self.bias)], unread)[0]
        (y,) = project(x, [self.product(None)], unread)
        if not unread:
            y = reduce_from_model_parallel_region(y)
        return y if self.bias is None else _AddBias.apply(y, self.bias)


def project_columns(x: Tensor | Recomputed, linears: list[Linear]) -> tuple[Tensor, ...]:
    """x [T, in], read by several column layers -> each one's y [T, out / ranks]. Its gradient is summed once."""
    if linears[0].ranks > 1:
        source = Recomputed.of(x)
        x = Recomputed(copy_to_model_parallel_region(source.value), source.inputs, source.make)
    return project(x, [linear.product(linear.bias) for linear in linears])


def prepare_decoding(linears: list[Linear]) -> None:
    """Have the storage of linears that are called together make ready for single tokens (see `PackedWeight`)."""
    first, *others = [linear.weight for linear in linears]
    if isinstance(first, PackedWeight):
        first.prepare_decoding(others)


class _AddBias(torch.autograd.Function):
    """y += b in place; the bias gradient is summed in fp32 however narrow the activations are."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_dtype = bias.dtype
        ctx.mark_dirty(y)
        return y.add_(bias.to(y.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        return dy, column_sums(dy).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
