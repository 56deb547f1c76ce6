"""Trained parts as a run leaves them, with random values in the place of training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.load import named_generator, targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_record import run_record
from accessory.checkpoint.source import model_args_of
from accessory.method import Method
from accessory.method.peft import Peft
from accessory.method.side_tuning import SideTuning


def write_trained(base: Path, directory: Path, quantization: str | None = None, **settings: Any) -> Path:
    """A trained part of `base` in the new `directory`: NormBiasLoRA of rank 4 unless `settings` say otherwise.

    Every trained tensor is random and large enough to matter; run.json says the base was trained on as `quantization`.
    """
    return _write(base, directory, Peft(Peft.Settings(**{"lora_rank": 4, "lora_alpha": 6, **settings})), quantization)


def write_trained_side(base: Path, directory: Path, quantization: str | None = None, **settings: Any) -> Path:
    """`write_trained` of a side network."""
    return _write(base, directory, SideTuning(SideTuning.Settings(**settings)), quantization)


def _write(base: Path, directory: Path, method: Method, quantization: str | None) -> Path:
    source = open_source(base)
    args = model_args_of(source)
    decoder = method.decoder(args, dtype=torch.float32)
    trainable = method.attach(decoder).trainable
    shapes = {place.name: place.local_shape for place in targets(decoder) if place.name in trainable}
    directory.mkdir(parents=True)
    save_file({name: _value(name, shape) for name, shape in shapes.items()}, directory / "trainable.safetensors")
    documents = {
        "config.json": args.model_dump() | method.settings.model_dump(),
        "meta.json": {"llama_type": f"{source.llama_type}{method.suffix}"},
        "run.json": run_record({}, [source], quantization, "") | {"started": "2024-02-03T04:05:06+0000"},
    }
    for name, content in documents.items():
        (directory / name).write_text(json.dumps(content))
    for file in base.glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def _value(name: str, shape: tuple[int, ...]) -> Tensor:
    spread = torch.randn(shape, generator=named_generator(1, name))
    if len(shape) == 2:
        return 0.1 * spread
    return 0.2 * spread + (0.0 if name.endswith(".bias") else 1.0)
