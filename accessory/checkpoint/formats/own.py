"""Accessory's own directories: a base, plain or packed, or a trained part; our names, Meta's settings, safetensors."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.lazy import LazyTensor, PackedTensor
from accessory.checkpoint.merge import repacked
from accessory.checkpoint.save import fresh_directory, write_json, write_tensors
from accessory.checkpoint.source import Source, open_safetensors, read_json, stated_llama_type, stated_settings
from accessory.checkpoint.vision_part import named_with_encoder
from accessory.checkpoint.whole import WholeModel, progress, read_as, refuse_existing
from accessory.data.templates import PROMPT_LAYOUTS
from accessory.errors import CheckpointError
from accessory.model.families import architecture_of
from accessory.quant import MIXES, QUANT_TYPES, find_storage

TRAINABLE_FILES = "trainable*.safetensors"
MODEL_FILES = "model*.safetensors"


def open_own(path: Path) -> Source | None:
    """Open a directory of ours; None for one that is not."""
    delta_files, model_files = sorted(path.glob(TRAINABLE_FILES)), sorted(path.glob(MODEL_FILES))
    files = delta_files or model_files
    if not files:
        return None
    run, meta = path / "run.json", path / "meta.json"
    tensors = open_safetensors(files)
    said = read_json(meta) if meta.is_file() else {}
    packing, recorded = said.get("packed"), _read_run(run) if run.is_file() else None
    return Source(
        path,
        "Accessory (trained part)" if delta_files else f"Accessory{' (packed)' if packing else ''}",
        files,
        _with_packed(tensors, packing, meta) if packing else tensors,
        settings=_with_tail(stated_settings(path), tensors),
        llama_type=stated_llama_type(path),
        is_delta=bool(delta_files),
        run=recorded,
        prompt_layouts=_layouts(*((run, recorded) if recorded else (meta, said))),
        system=_system(*((run, recorded) if recorded else (meta, said))),
    )


def _with_tail(settings: dict[str, Any] | None, tensors: dict[str, LazyTensor]) -> dict[str, Any] | None:
    """Earlier versions left out how long the tail of side tuning is where that followed from the base, by another rule
    than now; the blocks that have LoRA tell.
    """
    blocks = {name.split(".")[1] for name in tensors if name.startswith("layers.") and ".lora_" in name}
    if settings and blocks and settings.get("tail", 0) is None:
        return settings | {"tail": len(blocks)}
    return settings


def _read_run(file: Path) -> dict[str, Any]:
    """The content of run.json; its `base` and `quantization`, which say what a trained part belongs to, are checked."""
    run = read_json(file)
    base, quantization = run.get("base"), run.get("quantization", "")
    keys = ("path", "format", "fingerprint")
    if not (
        isinstance(base, list)
        and all(isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in keys) for entry in base)
    ):
        raise CheckpointError(f"{file}: 'base' is {base!r}; expected a list of objects with {', '.join(keys)}.")
    if not (quantization is None or find_storage(quantization) or quantization in list(MIXES)):
        raise CheckpointError(
            f"{file}: 'quantization' is {run.get('quantization', 'missing')!r}; expected null or one of "
            f"{', '.join(QUANT_TYPES)}."
        )
    return run


def _layouts(file: Path, said: dict[str, Any]) -> tuple[str, ...]:
    """The prompt layouts in run.json, or in a merged model's meta.json; earlier versions recorded none."""
    layouts = said.get("prompt_layouts", ())
    if not isinstance(layouts, dict | list | tuple) or not set(map(str, layouts)) <= set(PROMPT_LAYOUTS):
        raise CheckpointError(
            f"{file}: 'prompt_layouts' is {layouts!r}; expected those of {', '.join(PROMPT_LAYOUTS)}."
        )
    return tuple(layouts)


def _system(file: Path, said: dict[str, Any]) -> str | None:
    """The words of the system in run.json, or in a merged model's meta.json; earlier versions recorded none."""
    system = said.get("system")
    if not isinstance(system, str | None):
        raise CheckpointError(f"{file}: 'system' is {system!r}; expected a text, or null.")
    return system


def _with_packed(tensors: dict[str, LazyTensor], packing: object, meta: Path) -> dict[str, LazyTensor]:
    """Put the parts of each packed matrix together; `packing` is meta.json's name -> {quant_type, shape}."""
    if not isinstance(packing, dict):
        raise CheckpointError(f"{meta}: 'packed' is {packing!r}; expected an object of matrices.")
    found = dict(tensors)
    for name, entry in packing.items():
        try:
            rows, columns = (operator.index(size) for size in entry["shape"])
            kind = find_storage(entry["quant_type"])
            if kind is None:
                raise KeyError(entry["quant_type"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{meta}: says {entry!r} of {name}; expected quant_type and shape.") from error
        there = (part for part in (*kind.PARTS, *kind.OPTIONAL) if f"{name}.{part}" in found)
        parts = {part: found.pop(f"{name}.{part}") for part in there}
        found[name] = PackedTensor.of(parts, kind, (rows, columns), f"{meta.parent}: {name}")
    return found


def write_own(
    model: WholeModel,
    target: Path,
    dtype: torch.dtype,
    quant_type: str | None = None,
    documents: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a base: plain weights in `dtype`, or with the linears of all blocks packed as `quant_type`.

    Matrices that are packed already stay as they are. documents: other JSON files, by name. Tensor by tensor, whole or
    not at all; raises `CheckpointError`.
    """
    refuse_existing(target)
    packed: dict[str, Any] = {}
    with fresh_directory(target) as directory:
        write_tensors(directory, "model", _written(model, dtype, quant_type, packed))
        seen = {model.vision.key: model.vision.settings.model_dump()} if model.vision else {}
        write_json(directory / "config.json", model.args.model_dump() | seen)
        family = architecture_of(model.args.architecture, str(target)).family
        meta = {"llama_type": named_with_encoder(family, model.vision)}
        meta |= {"prompt_layouts": model.prompt_layouts} if model.prompt_layouts else {}
        meta |= {"system": model.system} if model.system is not None else {}
        write_json(directory / "meta.json", meta | ({"packed": packed} if packed else {}))
        for name, content in documents.items():
            write_json(directory / name, content)
        model.tokenizer.save(directory)


def _written(
    model: WholeModel, dtype: torch.dtype, quant_type: str | None, packed: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    tensors = repacked(model.tensors, quant_type) if quant_type else model.tensors
    for name, tensor in progress(tensors, "packing" if quant_type else "writing"):
        if isinstance(tensor, PackedTensor):
            packed[name] = {"quant_type": tensor.storage.name, "shape": list(tensor.shape)}
            yield from ((f"{name}.{part}", value) for part, value in tensor.read_packed().items())
        else:
            yield name, read_as(tensor, dtype)
