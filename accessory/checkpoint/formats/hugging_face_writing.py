"""Writes Hugging Face directories that transformers loads, plain or packed in bitsandbytes' layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.formats.bitsandbytes import quantization_config
from accessory.checkpoint.formats.hugging_face import INDEXES, SINGLES
from accessory.checkpoint.lazy import PackedTensor, StackedRows
from accessory.checkpoint.merge import repacked
from accessory.checkpoint.naming import BLOCK_LINEAR, Tensors, theirs_from_ours
from accessory.checkpoint.save import fresh_directory, in_shards, write_json
from accessory.checkpoint.whole import WholeModel, progress, read_as, refuse_existing
from accessory.errors import CheckpointError
from accessory.model.families import Architecture, architecture_of
from accessory.model.families.architecture import Fused
from accessory.quant import STORAGES
from accessory.tokenizer.transformers_files import save_for_transformers


def write_hugging_face(model: WholeModel, target: Path, dtype: torch.dtype, quant_type: str | None = None) -> None:
    """Write a directory that transformers loads, if it knows the model type: plain in `dtype`, or packed.

    With `quant_type` the linears of all blocks are packed in bitsandbytes' layout. Tensor by tensor, whole or not at
    all. Raises `CheckpointError` where the model type cannot express the settings or lacks a place for a tensor.
    """
    refuse_existing(target)
    architecture = architecture_of(model.args.architecture, str(target))
    model = model.in_layout(architecture.fixed.get("rotary_layout", "halves"))
    config = architecture.write(model.args) | _token_ids(model)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    theirs = theirs_from_ours(model.tensors, architecture.names, model.args)
    _refuse_repacking(theirs)
    if quant_type:
        theirs = repacked(theirs, quant_type, lambda name: _is_block_linear(name, architecture))
    packed = next((t.storage for t in theirs.values() if isinstance(t, PackedTensor)), None)
    if packed and not packed.IN_BITSANDBYTES:
        known = ", ".join(name for name, kind in STORAGES.items() if kind.IN_BITSANDBYTES)
        raise CheckpointError(
            f"{target}: {packed.name} matrices have no place in Hugging Face files: bitsandbytes, in whose layout they "
            f"are packed there, has no such format. Pack the full-precision checkpoint as one of {known}, or write it "
            "--to accessory."
        )
    if packed:
        config["quantization_config"] = quantization_config(packed, dtype)
    with fresh_directory(target) as directory:
        _write_shards(directory, _written(theirs, dtype, "packing" if quant_type else "writing"))
        write_json(directory / "config.json", config)
        save_for_transformers(model.tokenizer, directory)


def _token_ids(model: WholeModel) -> dict[str, Any]:
    tokenizer = model.tokenizer
    stops = sorted(tokenizer.stop_ids, key=lambda i: i != tokenizer.eos_id)
    # If the file gives no padding id, transformers takes the published model's, which a small one may lack.
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops}
    return ids | {"pad_token_id": tokenizer.eos_id}


def _refuse_repacking(theirs: Tensors) -> None:
    """Raise `CheckpointError` for packed matrices whose rows the format orders or fuses otherwise."""
    stacked = [
        name for name, t in theirs.items() if isinstance(t, StackedRows) and isinstance(t.parts[0], PackedTensor)
    ]
    selected = [name for name, t in theirs.items() if isinstance(t, PackedTensor) and t.rows is not None]
    if stacked or selected:
        raise CheckpointError(
            f"{', '.join((stacked + selected)[:4])}: packed rows cannot be laid out anew without loss. Quantize the "
            "full-precision checkpoint into this format instead (tools/quantize.py BASE TARGET --to hf)."
        )


def _is_block_linear(name: str, architecture: Architecture) -> bool:
    found = architecture.names.ours(name)
    if found is None:
        return False
    our = found[0].parts[0] if isinstance(found[0], Fused) else found[0]
    return BLOCK_LINEAR.fullmatch(f"{our}.{found[1]}") is not None


def _written(theirs: Tensors, dtype: torch.dtype, task: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in progress(theirs, task):
        if isinstance(tensor, PackedTensor):
            state = tensor.read_matrix().as_bitsandbytes(dtype)
            yield from ((f"{name}{suffix}", value) for suffix, value in state.items())
        else:
            yield name, read_as(tensor, dtype)


def _write_shards(directory: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Files of about `SHARD_BYTES`, named and indexed as transformers does once their number is known."""
    shards: list[list[str]] = []
    total = 0
    for shard in in_shards(tensors):
        save_file(shard, directory / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(shards) == 1:
        (directory / "0.part").rename(directory / SINGLES[0])
        return
    where = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{i}.part").rename(directory / file)
        where |= dict.fromkeys(names, file)
    write_json(directory / INDEXES[0], {"metadata": {"total_size": total}, "weight_map": where})
