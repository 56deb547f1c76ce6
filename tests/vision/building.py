"""A tiny decoder with an encoder, filled from tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.load import fill_module, targets
from accessory.checkpoint.source import open_safetensors, read_json
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight
from accessory.vision import Vision, vision_of_directory

CPU = torch.device("cpu")


def opened(path: Path) -> tuple[Vision, dict[str, Any]]:
    """The encoder of a Hugging Face directory, and its tensors by our names."""
    vision = vision_of_directory(read_json(path / "config.json"), str(path / "config.json"))
    return vision, vision.from_directory(open_safetensors([path / "model.safetensors"]))


def built(
    vision: Vision,
    tensors: Mapping[str, Any],
    storage: type[PackedWeight] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A decoder with the encoder, filled as a checkpoint fills it; the projection starts by a seed.

    Every tensor must have a place.
    """
    decoder = Decoder(ModelArgs(dim=32, n_layers=1, n_heads=2, vocab_size=16), dtype=dtype)
    starts = vision.attach(decoder, dtype, storage)
    generator = torch.Generator().manual_seed(1)
    tensors = {name: HeldTensor(start(generator)) for name, start in starts.items()} | dict(tensors)
    places = {target.name: target.local_shape for target in targets(decoder)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()}.items() <= places.items()
    fill_module(decoder, "", tensors, Layout(), there={name for name in places if not vision.owns(name)})
    vision.place_buffers(decoder, CPU)
    return decoder


def values(tensors: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """Tensors that are read, without the `prefix` of their names."""
    return {name.removeprefix(prefix): tensor.read() for name, tensor in tensors.items()}


def images(count: int, size: int = 28) -> Tensor:
    """Random pixels [count, 3, size, size]."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))
