"""The gate of a feed-forward layer (Shazeer 2020) in bf16: silu(x) * up and its gradients, one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled

ACTIVATIONS = ("silu",)


def forward(x: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(x) * up, both [..., F], in x's dtype."""
    y = torch.empty(x.shape, dtype=x.dtype)
    _run("gate_forward", activation, x, up, y)
    return y


def backward(dy: Tensor, x: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dx, dup) of `forward`, in x's dtype."""
    dx, dup = (torch.empty(x.shape, dtype=x.dtype) for _ in range(2))
    _run("gate_backward", activation, dy, x, up, dx, dup)
    return dx, dup


def _run(name: str, activation: str, *tensors: Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise AssertionError(f"activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    whole = [tensor.contiguous() for tensor in tensors]
    addresses = (tensor.data_ptr() for tensor in whole)
    compiled(name, "p" * len(whole) + "nn")(*addresses, whole[0].numel(), torch.get_num_threads())
