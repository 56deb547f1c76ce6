"""Writes Hugging Face directories that transformers loads, plain or packed in the layout of other software."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.formats.awq_writing import awq_layout
from accessory.checkpoint.formats.bitsandbytes import bitsandbytes_layout, relaid
from accessory.checkpoint.formats.gptq_writing import gptq_layout
from accessory.checkpoint.formats.greenbit_writing import greenbit_layout
from accessory.checkpoint.formats.hugging_face import INDEXES, SINGLES
from accessory.checkpoint.formats.packed_layout import PackedLayout
from accessory.checkpoint.lazy import PackedTensor, StackedRows
from accessory.checkpoint.merge import repacked
from accessory.checkpoint.naming import BLOCK_LINEAR, Tensors, theirs_from_ours
from accessory.checkpoint.save import fresh_directory, in_shards, write_json
from accessory.checkpoint.whole import WholeModel, progress, read_as, refuse_existing
from accessory.model.families import Architecture, architecture_of
from accessory.model.families.architecture import Fused
from accessory.quant import PackedWeight, storage
from accessory.quant.groups import GroupWeight, group_storage
from accessory.tokenizer.transformers_files import save_for_transformers

LAYOUTS = {"hf": bitsandbytes_layout, "gptq": gptq_layout, "awq": awq_layout, "greenbit": greenbit_layout}
"""Value of `--to` -> how packed matrices lie in such a directory."""
WHOLE = ("gptq", "awq")
"""Layouts whose zero points are whole: what is packed for them is fitted to such a grid."""


def write_hugging_face(
    model: WholeModel, target: Path, dtype: torch.dtype, quant_type: str | None = None, layout: str = "hf"
) -> None:
    """Write a directory that transformers loads, if it knows the model type: plain in `dtype`, or packed.

    layout: one of `LAYOUTS`. With `quant_type` the linears of all blocks are packed. Tensor by tensor, whole or not at
    all. Raises `CheckpointError` where the model type cannot express the settings or lacks a place for a tensor.
    """
    refuse_existing(target)
    theirs, packed, config = laid_out(model, target, dtype, quant_type, layout)
    with fresh_directory(target) as directory:
        _write_shards(directory, _written(theirs, dtype, packed, "packing" if quant_type else "writing"))
        for name, content in {"config.json": config, **packed.files}.items():
            write_json(directory / name, content)
        save_for_transformers(model.tokenizer, directory)
    packed.said()


def laid_out(
    model: WholeModel, target: Path, dtype: torch.dtype, quant_type: str | None, layout: str
) -> tuple[Tensors, PackedLayout, dict[str, Any]]:
    """What `write_hugging_face` writes: (tensors by name, how files hold packed ones, config.json); raises as it does.

    Plain weights are not read.
    """
    architecture = architecture_of(model.args.architecture, str(target))
    model = model.in_layout(architecture.fixed.get("rotary_layout", "halves"))
    config = architecture.write(model.args) | _token_ids(model)
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    theirs = theirs_from_ours(model.tensors, architecture.names, model.args)
    _refuse_stacking(theirs)
    linears = {name for name in theirs if _is_block_linear(name, architecture)}
    if quant_type:
        theirs = repacked(theirs, quant_type, linears.__contains__, _fitted(linears, quant_type, layout))
    packed = LAYOUTS[layout](theirs, linears, target, dtype)
    return theirs, packed, config | packed.config


def _fitted(linears: set[str], quant_type: str, layout: str) -> dict[str, type[PackedWeight]]:
    """How linears are packed for a layout, where that is not the usual form of `quant_type`."""
    kind = storage(quant_type)
    if layout not in WHOLE or not issubclass(kind, GroupWeight):
        return {}
    return {name.removesuffix(".weight"): group_storage(kind.bits, kind.group, ("points",)) for name in linears}


def _token_ids(model: WholeModel) -> dict[str, Any]:
    tokenizer = model.tokenizer
    stops = sorted(tokenizer.stop_ids, key=lambda i: i != tokenizer.eos_id)
    # If the file gives no padding id, transformers takes the published model's, which a small one may lack.
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stops[0] if len(stops) == 1 else stops}
    return ids | {"pad_token_id": tokenizer.eos_id}


def _refuse_stacking(theirs: Tensors) -> None:
    """Raise `CheckpointError` for packed matrices that the format holds in one."""
    stacked = [n for n, t in theirs.items() if isinstance(t, StackedRows) and isinstance(t.parts[0], PackedTensor)]
    if stacked:
        raise relaid(stacked)


def _is_block_linear(name: str, architecture: Architecture) -> bool:
    found = architecture.names.ours(name)
    if found is None:
        return False
    our = found[0].parts[0] if isinstance(found[0], Fused) else found[0]
    return BLOCK_LINEAR.fullmatch(f"{our}.{found[1]}") is not None


def _written(theirs: Tensors, dtype: torch.dtype, packed: PackedLayout, task: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in progress(theirs, task):
        if isinstance(tensor, PackedTensor):
            yield from packed.tensors(name, tensor).items()
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
