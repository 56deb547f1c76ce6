"""The gate of a feed-forward layer (Shazeer 2020) in bf16: silu(x) * up and its gradients, one pass each."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels.avx512.compiling import compiled
from accessory.kernels.operands import address, contiguous

ACTIVATIONS = ("silu",)


def takes(activation: str) -> bool:
    """Whether `activation` is among those that are known."""
    return activation in ACTIVATIONS


def forward(x: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(x) * up, both [..., F], in x's dtype."""
    (y,) = _run("gate_forward", activation, 1, x=x, up=up)
    return y


def backward(dy: Tensor, x: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dx, dup) of `forward`, in x's dtype."""
    dx, dup = _run("gate_backward", activation, 2, dy=dy, x=x, up=up)
    return dx, dup


def _run(name: str, activation: str, results: int, **operands: Tensor) -> list[Tensor]:
    if activation not in ACTIVATIONS:
        raise AssertionError(f"activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    shape = operands["x"].shape
    given = [contiguous(tensor, shape, of) for of, tensor in operands.items()]
    found = [torch.empty_like(given[0]) for _ in range(results)]
    addresses = map(address, (*given, *found))
    compiled(name, "p" * (len(given) + results) + "nn")(*addresses, shape.numel(), torch.get_num_threads())
    return found
