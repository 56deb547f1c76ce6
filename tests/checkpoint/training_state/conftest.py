"""Optimizers that have stepped, whose state lies in tmp_path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from accessory.optim import build_optimizer
from tests.checkpoint.training_state.states import (
    new_parameters,
    step,
    write,
)


@pytest.fixture
def trained(tmp_path: Path) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Parameters and optimizer after three steps, whose state lies in tmp_path."""
    parameters = new_parameters()
    optimizer = build_optimizer("adamw", parameters, 0.1, 0.1)
    for _ in range(3):
        step(parameters, optimizer)
    write(tmp_path, parameters, optimizer)
    return parameters, optimizer


@pytest.fixture
def trained_in_8_bits(tmp_path: Path) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """As `trained`, with parameters that are large enough for it, and a small one."""
    torch.manual_seed(0)
    shapes = {"wq.weight": (64, 100), "wo.weight": (90, 64), "norm.weight": (6,)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = build_optimizer("adamw8bit", parameters, 0.1, 0.1)
    for _ in range(3):
        step(parameters, optimizer)
    write(tmp_path, parameters, optimizer)
    return parameters, optimizer
