"""Parameters that are cut over ranks in every way there is, with gradients."""

from __future__ import annotations

import torch
from torch import nn

from accessory.parallel.tensor import Slicing

SLICINGS = {"a.weight": Slicing(dim=0), "b.weight": Slicing(dim=1), "c.bias": Slicing(partial=True), "d": Slicing()}


def four_parameters() -> dict[str, nn.Parameter]:
    """At random, the same at every call."""
    torch.manual_seed(0)
    made = {name: nn.Parameter(torch.randn(4, 6)) for name in SLICINGS}
    for parameter in made.values():
        parameter.grad = torch.randn(4, 6)
    return made
