"""A library's linears, packed: the weight in the run's storage, as the decoder's are, but without a backward."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from accessory.kernels.addition import Addition
from accessory.parallel.tensor import WHOLE
from accessory.quant import PackedWeight
from accessory.quant.products import multiply

BLOCK = 64
"""A matrix whose columns this does not divide stays plain: blocks and groups of most storages would not fit it."""


class FrozenLinear(nn.Module):
    """y = x W^T + b with a packed W [N, K] and a plain b [N] or None, in place of `torch.nn.Linear`."""

    def __init__(self, out_features: int, in_features: int, bias: nn.Parameter | None, storage: type[PackedWeight]):
        super().__init__()
        self.weight = storage((out_features, in_features))
        self.weight.slicing = WHOLE
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], in x's dtype. No gradient goes through it."""
        flat = x.reshape(-1, x.shape[-1])
        return multiply(flat, self.weight, Addition(self.bias)).view(*x.shape[:-1], -1)


def pack_linears(module: nn.Module, storage: type[PackedWeight], plain: tuple[str, ...] = ()) -> None:
    """Put packed linears in place of those under `module`, which are on meta.

    Those whose name ends in one of `plain` stay, and those whose width does not fit.
    """
    found = [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    for name, linear in found:
        if linear.in_features % BLOCK == 0 and not name.endswith(plain):
            packed = FrozenLinear(linear.out_features, linear.in_features, linear.bias, storage)
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, packed)


def on_meta(make: type[nn.Module], config: object, dtype: torch.dtype) -> nn.Module:
    """A library's module, made from its `config` on the meta device, frozen, in `dtype`."""
    with torch.device("meta"):
        return make(config).to(dtype).requires_grad_(False)
