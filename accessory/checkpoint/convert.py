"""Writes any readable checkpoint as an Accessory directory: our names, one dtype, settings and tokenizer beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from accessory.checkpoint.save import fresh_directory, write_json, write_tensors
from accessory.checkpoint.source import Source
from accessory.errors import CheckpointError
from accessory.tokenizer import Tokenizer
from accessory.tokenizer.sniff import what_is


def write_base(
    source: Source, settings: dict[str, Any], tokenizer: Tokenizer, target: Path, dtype: torch.dtype
) -> None:
    """Write `source` to the new directory `target`, tensor by tensor.

    Raises `CheckpointError` if it cannot be written, or if something lies there already: it would be replaced whole.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(f"{target}: found {what_is(target)} there; expected a new or empty directory.")
    with fresh_directory(target) as directory:
        write_tensors(directory, "model", _cast(source, dtype))
        write_json(directory / "config.json", settings)
        write_json(directory / "meta.json", {"llama_type": "llama"})
        tokenizer.save(directory)


def _cast(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tqdm(sorted(source.tensors.items()), desc="converting", unit="tensor", disable=None):
        yield name, tensor.read().to(dtype, copy=True)  # read tensors may share a file's memory
