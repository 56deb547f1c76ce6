"""What a resumed run needs beside the trained weights: optimizer moments, counters, random generators.

Moments are saved whole, cut like the parameters they belong to, so that a run can be resumed on another layout.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from accessory.checkpoint.save import STATE_STEM, gather_whole
from accessory.checkpoint.source import read_json
from accessory.errors import CheckpointError
from accessory.parallel.data import shard_like
from accessory.parallel.groups import Layout, model_parallel_group
from accessory.parallel.tensor import Slicing, own_slice
from accessory.tokenizer.sniff import what_is

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """Where a run stands. `step` counts optimizer steps within `epoch`, `total_steps` over all epochs."""

    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    loss_scale: float = 1.0
    good_steps: int = 0


def collect_training_state(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], slicings: dict[str, Slicing]
) -> dict[str, Tensor]:
    """Moments put together from all ranks and every rank's generators, on the main rank's CPU. A collective."""
    tensors: dict[str, Tensor] = {}
    for moment in _MOMENTS:
        states = {name: optimizer.state[p][moment] for name, p in parameters.items() if p in optimizer.state}
        tensors |= {f"{moment}.{name}": value for name, value in gather_whole(states, slicings)}
    if counts := [optimizer.state[p]["step"] for p in parameters.values() if p in optimizer.state]:
        tensors["step"] = counts[0].detach().cpu()  # fewer than the run's steps where fp16 skipped some
    generators: list[dict[str, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(generators, _generators())
    for rank, states in enumerate(generators):
        tensors |= {f"generator.{kind}.{rank}": value for kind, value in states.items()}
    tensors["mp_size"] = torch.tensor(dist.get_world_size(model_parallel_group()))
    return tensors


def state_record(progress: Progress, identity: dict[str, Any]) -> dict[str, Any]:
    """The JSON beside the tensors; `identity` is what must be equal for a run to be resumed."""
    return {"progress": asdict(progress), "identity": identity}


def load_training_state(
    directory: Path,
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    slicings: dict[str, Slicing],
    layout: Layout,
    identity: dict[str, Any],
) -> tuple[Progress, bool]:
    """Restore the optimizer and this rank's generators; returns the progress and whether the layout is the same.

    Raises `CheckpointError` for a directory without a training state, or one of a different run, field by field.
    """
    record, state_file = directory / f"{STATE_STEM}.json", directory / f"{STATE_STEM}.safetensors"
    if not record.is_file() or not state_file.is_file():
        raise CheckpointError(f"{directory}: holds no training state to resume from; expected {record.name} in it.")
    saved = read_json(record)
    differing = [
        f"{key} was {saved['identity'].get(key)!r}, is {value!r}"
        for key, value in identity.items()
        if saved["identity"].get(key) != value
    ]
    if differing:
        raise CheckpointError(f"{directory}: belongs to another run: {'; '.join(differing)}.")
    tensors = _read(state_file, parameters)
    progress = Progress(**saved["progress"])
    count = tensors.get("step", torch.tensor(float(progress.total_steps)))
    for name, parameter in parameters.items():
        moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS if f"{moment}.{name}" in tensors}
        if moments:  # else the optimizer has not stepped yet
            placed = {key: _place(value, parameter, slicings[name], layout) for key, value in moments.items()}
            optimizer.state[parameter] = {"step": count.to(parameter.device, copy=True)} | placed
    ranks = sum(name.startswith("generator.cpu.") for name in tensors)
    mp_size = int(tensors.get("mp_size", layout.mp_size))
    same_layout = (ranks, mp_size) == (layout.world_size, layout.mp_size)
    if same_layout:
        torch.set_rng_state(tensors[f"generator.cpu.{layout.rank}"])
        if layout.device.type == "cuda" and f"generator.cuda.{layout.rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"generator.cuda.{layout.rank}"], layout.device)
    return progress, same_layout


def _read(file: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: found {what_is(file)}; cannot be read as safetensors ({error}).") from error
    wanted = [f"{moment}.{name}" for moment in _MOMENTS for name in parameters]
    if not any(name.startswith(_MOMENTS) for name in tensors):
        return tensors
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(f"{file}: {', '.join(missing[:5])} is missing; expected the moments of what is trained.")
    return tensors


def _place(value: Tensor, parameter: nn.Parameter, slicing: Slicing, layout: Layout) -> Tensor:
    value = own_slice(value, slicing, layout.mp_rank, layout.mp_size).contiguous()
    return shard_like(value.to(parameter.device), parameter)


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
