"""The gate of a feed-forward layer (Shazeer 2020): act(x) * up and its gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.torch_compile import fusible

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
_GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # (dy, x) -> dx
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dy, x: torch.ops.aten.gelu_backward(dy, x, approximate="tanh"),
    "relu": lambda dy, x: torch.ops.aten.threshold_backward(dy, x, 0),
}


@fusible
def forward(x: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(x) * up, both [..., F], in x's dtype."""
    return ACTIVATIONS[activation](x).mul_(up)


@fusible
def backward(dy: Tensor, x: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dx, dup) of `forward`, in x's dtype."""
    return _GRADIENTS[activation](dy * up, x), ACTIVATIONS[activation](x).mul_(dy)
