"""Writes any checkpoint that can be read as an Accessory directory: our names, one dtype, settings and tokenizer beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.checkpoint.save import fresh_directory, write_json, write_tensors
from accessory.checkpoint.source import Source
from accessory.tokenizer import Tokenizer


def write_base(
    source: Source, settings: dict[str, Any], tokenizer: Tokenizer, target: Path, dtype: torch.dtype
) -> None:
    """Write `source` to the directory `target`, tensor by tensor. Raises `CheckpointError` if it cannot be written."""
    with fresh_directory(target) as directory:
        write_tensors(directory, "model", _cast(source, dtype))
        write_json(directory / "config.json", settings)
        write_json(directory / "meta.json", {"llama_type": "llama"})
        tokenizer.save(directory)


def _cast(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tqdm(sorted(source.tensors.items()), desc="converting", unit="tensor", disable=None):
        yield name, tensor.read().to(dtype)
