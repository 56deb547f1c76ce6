"""Training states of three small parameters, written as the checkpoint writer does and read as a resumed run does."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from accessory.checkpoint.save import write_json, write_tensors
from accessory.checkpoint.training_state import (
    Progress,
    Resumption,
    collect_training_state,
    find_resumption,
    restore_training_state,
    state_record,
)
from accessory.optim import build_optimizer
from accessory.parallel.groups import Layout
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import Slicing

SLICINGS = {"wq.weight": Slicing(dim=0), "wo.weight": Slicing(dim=1), "norm.weight": Slicing(partial=True)}
IDENTITY = {
    "llama_type": "llama_peft", "settings": {"lora_rank": 4, "lora_targets": ["wq", "wo"]}, "seed": 0,
    "data": {"max_words": 1024, "META": [{"prompt_type": "alpaca", "content": "ab"}]},
    "global_batch": 16, "quantization": None, "optim": "adamw", "base": "ef56", "precision": "bf16", "lr": 1e-4,
    "min_lr": 1e-5, "warmup_epochs": 0.1, "epochs": 3, "weight_decay": 0.02, "clip_grad": 2.0,
    "lr_schedule": "cosine", "adam_beta2": 0.95,
}  # fmt: skip
OTHER = {
    "llama_type": "llama", "settings": {"lora_rank": 8, "lora_targets": ["wq", "wo"]}, "seed": 1,
    "data": {"max_words": 512, "META": [{"prompt_type": "none", "content": "ab"}]},
    "global_batch": 8, "quantization": "nf4", "optim": "adamw8bit", "base": "0a1b", "precision": "fp16", "lr": 2e-4,
    "min_lr": 0.0, "warmup_epochs": 0.2, "epochs": 4, "weight_decay": 0.0, "clip_grad": -1.0,
    "lr_schedule": "constant", "adam_beta2": 0.999,
}  # fmt: skip
PROGRESS = Progress(epoch=1, step=2, total_steps=7, loss_scale=1024.0, good_steps=3)


def new_parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    """Three parameters of different shapes."""
    torch.manual_seed(seed)
    shapes = {"wq.weight": (8, 6), "wo.weight": (6, 8), "norm.weight": (6,)}
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}


def step(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """One optimizer step on random gradients."""
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def write(directory: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """As the checkpoint writer does."""
    state = collect_training_state(optimizer, NamedParameters(parameters, SLICINGS))
    write_tensors(directory, "training_state", state.items())
    write_json(directory / "training_state.json", state_record(PROGRESS, IDENTITY, conditions(Layout())))


def conditions(layout: Layout) -> dict:
    """What must be equal for a run to go on bit for bit."""
    return {"world_size": layout.world_size, "mp_size": layout.mp_size, "threads": 2}


def load(
    directory: Path, parameters: dict[str, nn.Parameter], optimizer, layout: Layout | None = None, allowed=(), **changes
) -> Resumption:
    """As a resumed run does."""
    layout = layout or Layout()
    found = find_resumption(directory, IDENTITY | changes, conditions(layout), allowed)
    restore_training_state(found, optimizer, NamedParameters(parameters, SLICINGS), layout)
    return found


def saved_by(directory: Path, ranks: int, mp_size: int) -> None:
    """Say that what lies there was saved by as many ranks."""
    path = directory / "training_state.json"
    record = json.loads(path.read_text())
    record["conditions"] |= {"world_size": ranks, "mp_size": mp_size}
    path.write_text(json.dumps(record))


def check_that_it_goes_on(
    directory: Path, optim: str, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, torch.Tensor]]:
    """Two steps of `optimizer`, and of one that resumes from its state in `directory`, are the same bit for bit.

    Returns the resumed one's state before these steps, by parameter.
    """
    copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in parameters.items()}
    for _ in range(2):
        step(parameters, optimizer)
    torch.manual_seed(99)
    resumed = build_optimizer(optim, copies, 0.1, 0.1)
    assert load(directory, copies, resumed) == Resumption(directory, PROGRESS, 1, 1, (), ())
    restored = {name: dict(resumed.state[copy]) for name, copy in copies.items()}
    for _ in range(2):
        step(copies, resumed)
    for name, parameter in parameters.items():
        assert torch.equal(copies[name], parameter), name
        ours, theirs = resumed.state[copies[name]], optimizer.state[parameter]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    return restored
