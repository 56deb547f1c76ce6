"""The tensor-parallel linear: a product with a weight, what the method adds to it, and the communication around it.

The three are independent: `weight` is a plain parameter or a packed one (`accessory.quant`), `lora_a`, `lora_b` and
`bias` are added by a method (`accessory.method`), and `cut` says which dimension of the matrix the ranks divide. A
method may also multiply the sum of all that by `scale`, a number for each output (LitGPT's adapter v2).

LoRA (Hu et al. 2021) needs no communication of its own. Column: A is whole and B is cut with the rows of W, so A's
gradient is this rank's share. Row: A is cut with the columns of W and B is whole, the sum over ranks that the base
needs anyway completes the product, and B's gradient is this rank's share.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory import kernels
from accessory.kernels.addition import NOTHING, Addition
from accessory.model.projection import project
from accessory.model.recomputable import Recomputable, recomputing
from accessory.parallel.data import is_sharded
from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import (
    WHOLE,
    Slicing,
    copy_to_model_parallel_region,
    mark,
    reduce_from_model_parallel_region,
)
from accessory.quant import PackedWeight

Cut = Literal["column", "row"]
_ROWS, _GPU_ROWS = 512, 2048


class LoraFactor(nn.Module):
    """One low-rank factor, fp32: `lora_a` [R, in] or `lora_b` [out, R], or this rank's slice of it."""

    def __init__(self, shape: tuple[int, int], slicing: Slicing) -> None:
        super().__init__()
        self.weight = mark(nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")), slicing)


class Linear(nn.Module):
    """This rank's part of y = x W^T + b, with W [out_features, in_features] cut by columns or rows (Megatron's terms).

    column: x [T, in] whole -> y [T, out / ranks]; those that share an x are called by `project_columns`.
    row: x [T, in / ranks] -> y [T, out] whole, summed over the ranks; called by itself.
    `ends_block`: y is used for the block's result only, so it is not computed when the block is recomputed.
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
        storage: type[PackedWeight] | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.cut, self.ranks = in_features, out_features, cut, ranks
        self.weight_slicing = Slicing(dim=0 if cut == "column" else 1)
        self.keep_plain(dtype) if storage is None else self.keep_packed(storage)
        self.register_parameter("bias", None)
        self.register_parameter("scale", None)
        if bias:
            self.add_bias(dtype)
        self.lora_a: LoraFactor | None = None
        self.lora_b: LoraFactor | None = None
        self.lora_scale, self.lora_dropout = 1.0, 0.0
        self.ends_block = False

    def keep_plain(self, dtype: torch.dtype) -> None:
        """Store W unquantized in `dtype`, whatever the storage of other linears."""
        plain = torch.empty(self._weight_shape(), dtype=dtype, device="meta")
        self.weight = mark(nn.Parameter(plain), self.weight_slicing)

    def keep_packed(self, storage: type[PackedWeight]) -> None:
        """Store W packed, whatever the storage of other linears."""
        shape = self._weight_shape()
        dim = self.weight_slicing.dim
        self.weight = storage.of_range(self.in_features, (dim, 0, shape[dim]))(shape)
        self.weight.slicing = self.weight_slicing

    def _weight_shape(self) -> tuple[int, int]:
        """Of this rank's part of W."""
        if self.cut == "column":
            return self.out_features // self.ranks, self.in_features
        return self.out_features, self.in_features // self.ranks

    def add_bias(self, dtype: torch.dtype) -> None:
        """Give the layer a bias in `dtype`: a column layer cuts it with the rows of W, a row layer adds it whole."""
        size = self.out_features // self.ranks if self.cut == "column" else self.out_features
        slicing = Slicing(dim=0) if self.cut == "column" else WHOLE
        self.bias = mark(nn.Parameter(torch.empty(size, dtype=dtype, device="meta")), slicing)

    def add_scale(self) -> None:
        """Multiply the layer's outputs, bias and all, by one fp32 number each, cut as a bias is."""
        size = self.out_features // self.ranks if self.cut == "column" else self.out_features
        slicing = Slicing(dim=0) if self.cut == "column" else WHOLE
        self.scale = mark(nn.Parameter(torch.empty(size, dtype=torch.float32, device="meta")), slicing)

    def add_lora(self, rank: int, scale: float, dropout: float) -> None:
        """Give the layer LoRA factors of `rank`, fp32, with `dropout` on their input in training."""
        rows, columns = self.weight.shape
        of_a, of_b = Slicing(partial=True), Slicing(dim=0)
        if self.cut == "row":
            of_a, of_b = Slicing(dim=1), Slicing(partial=True)
        self.lora_a, self.lora_b = LoraFactor((rank, columns), of_a), LoraFactor((rows, rank), of_b)
        self.lora_scale, self.lora_dropout = scale, dropout

    def addition(self, bias: Tensor | None) -> Addition:
        """What one forward adds to the product: `bias`, and LoRA if there is one, with a new dropout mask.

        Its seed comes from the CPU's generator, which is in the same state on all ranks of a model-parallel group: an x
        that is whole on each of them must lose the same values. Of a cut x each rank has its own slice.
        """
        factor = self.lora_a
        if factor is None:
            return Addition(bias)
        a, b, dropout = factor.weight, self.lora_b.weight, self.lora_dropout
        if not (dropout and self.training):
            return Addition(bias, a, b, self.lora_scale)
        seed = int(torch.randint(1 << 62, ()))
        if self.cut == "row":
            seed += dist.get_rank(model_parallel_group())
        # Dropout's factor 1 / (1 - dropout) goes into the scale, where no narrow dtype rounds it.
        return Addition(bias, a, b, self.lora_scale / (1 - dropout), dropout, seed)

    def forward(self, x: Tensor | Recomputable) -> Tensor:
        """A row layer: x [T, in / ranks] -> y [T, out], in x's dtype."""
        skip_output = self.ends_block and self.scale is None and recomputing()
        if self.ranks == 1:
            return self.scaled(project(x, [self.weight], [self.addition(self.bias)], skip_output)[0])
        (y,) = project(x, [self.weight], [self.addition(None)], skip_output)
        if not skip_output:
            y = reduce_from_model_parallel_region(y)
        return self.scaled(y if self.bias is None else _AddBias.apply(y, self.bias))

    def scaled(self, y: Tensor) -> Tensor:
        """y [T, out / ranks] times `scale`, if there is one."""
        return y if self.scale is None else _Scale.apply(y, self.scale)


def project_columns(x: Tensor | Recomputable, linears: list[Linear]) -> tuple[Tensor, ...]:
    """x [T, in] -> y [T, out / ranks] of each of several column layers. x's gradient is summed over ranks once."""
    if linears[0].ranks > 1:
        source = Recomputable.of(x)
        x = source._replace(value=copy_to_model_parallel_region(source.value))
    made = project(x, [linear.weight for linear in linears], [linear.addition(linear.bias) for linear in linears])
    return tuple(linear.scaled(y) for linear, y in zip(linears, made, strict=True))


def lora_additions(linears: list[Linear]) -> list[Addition]:
    """What LoRA adds to each, without the seed of a dropout mask; empty without LoRA, or if it is sharded."""
    found = []
    for linear in linears:
        factors = () if linear.lora_a is None else (linear.lora_a.weight, linear.lora_b.weight)
        if not factors or any(map(is_sharded, factors)):
            found.append(NOTHING)
        else:
            found.append(Addition(None, *factors, dropout=linear.lora_dropout if linear.training else 0.0))
    return found


def prepare_decoding(linears: list[Linear]) -> None:
    """Prepare the storage of linears that share an input for decoding (see `PackedWeight.prepare_decoding`)."""
    first, *others = [linear.weight for linear in linears]
    if isinstance(first, PackedWeight):
        first.prepare_decoding(others)


class _AddBias(torch.autograd.Function):
    """y += b in place; the bias gradient is summed in fp32 however narrow the activations are."""

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor) -> Tensor:
        """y [T, N] and bias [N] -> y itself."""
        ctx.bias_dtype = bias.dtype
        ctx.mark_dirty(y)
        return y.add_(bias.to(y.dtype))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """dy [T, N] -> y's gradient, which is dy, and the bias's [N] in its own dtype, if wanted."""
        sums = kernels.of("column_sums", dy).column_sums
        return dy, sums(dy).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None


def wide_rows(device: torch.device) -> int:
    """For how many tokens there are fp32 copies at once; on a GPU more, which has launches to save."""
    return _GPU_ROWS if device.type == "cuda" else _ROWS


def scale_bytes(tokens: int, outputs: int, device: torch.device) -> int:
    """Bytes that the gradient of a scale works in: fp32 copies of a gradient and of products, of some tokens."""
    return 2 * 4 * min(tokens, wide_rows(device)) * outputs


class _Scale(torch.autograd.Function):
    """y s, rounded once: s is near one, where a narrow dtype has few numbers."""

    @staticmethod
    def forward(ctx, y: Tensor, scale: Tensor) -> Tensor:
        """y [T, N], scale [N] -> [T, N] in y's dtype."""
        ctx.save_for_backward(y, scale)
        return torch.mul(y, scale, out=torch.empty_like(y))

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """dy [T, N] -> y's gradient, and the scale's [N] in its own dtype, summed over some tokens at a time."""
        y, scale = ctx.saved_tensors
        dscale = None
        if ctx.needs_input_grad[1]:
            rows = wide_rows(y.device)
            parts = zip(dy.split(rows), y.split(rows), strict=True)
            dscale = sum((one.to(scale.dtype) * other).sum(0) for one, other in parts)
        return torch.mul(dy, scale, out=torch.empty_like(dy)), dscale
