"""A side network on disk: written as a trained part of ours, read from whatever form is known."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from accessory.checkpoint.load import overlay
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.save import fresh, write_json
from accessory.checkpoint.source import Source, read_json
from accessory.errors import CheckpointError, ConfigError
from accessory.method.side_network import SideDecoder
from accessory.method.side_tuning import SideTuning
from accessory.model.families import architecture_of

WEIGHTS_FILE = "trainable.safetensors"
_SHOWN = 8  # faults listed


def save_state(decoder: SideDecoder, trainable: Set[str], directory: Path) -> None:
    """Write the parameters called `trainable` and what they belong to. Raises `CheckpointError` where it cannot.

    File by file, the weights last: other files in `directory` stay.
    """
    config = directory / "config.json"
    if config.is_file() and "model_type" in read_json(config):
        raise CheckpointError(f"{config}: belongs to a transformers model; expected a directory without one.")
    family = architecture_of(decoder.args.architecture, "architecture").family
    documents = {
        config.name: {**decoder.args.model_dump(), **decoder.settings.model_dump()},
        "meta.json": {"llama_type": family + SideTuning.suffix},
    }
    for name, content in documents.items():
        with fresh(directory / name) as partial:
            write_json(partial, content)
    tensors = {name: p.detach().contiguous() for name, p in decoder.named_parameters() if name in trainable}
    with fresh(directory / WEIGHTS_FILE) as partial:
        save_file(tensors, partial)


@torch.no_grad()
def load_state(decoder: SideDecoder, parameters: dict[str, nn.Parameter], trainable: Set[str], directory: Path) -> None:
    """Fill `parameters`, those of `decoder` that the method added; the directory has the `trainable` ones at least.

    Raises `CheckpointError` listing what is missing, has no place or another shape; `ConfigError` for a side network
    that was trained with settings by which it computes differently.
    """
    family = architecture_of(decoder.args.architecture, "architecture").family
    base = Source(Path("the model"), "transformers", [], {}, settings=decoder.args.model_dump(), llama_type=family)
    source = open_source(directory, base)
    if conflict := SideTuning(decoder.settings).conflict(source.settings or {}, decoder.args):
        raise ConfigError(f"{directory}: {conflict}.")
    tensors, _ = overlay([source], decoder.args)
    faults = [f"{name} is missing" for name in sorted(trainable - tensors.keys())]
    faults += [f"{name} has no place" for name in sorted(tensors.keys() - parameters.keys())]
    faults += [
        f"{name} has shape {tensors[name].shape}, expected {tuple(p.shape)}"
        for name, p in parameters.items()
        if name in tensors and tensors[name].shape != tuple(p.shape)
    ]
    if faults:
        more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise CheckpointError(f"{directory}: does not fit this side network: {'; '.join(faults[:_SHOWN])}{more}.")
    for name, parameter in parameters.items():
        if name in tensors:
            parameter.copy_(tensors[name].read())
