"""How bitsandbytes stores packed matrices in Hugging Face files: codes, statistics, and a JSON text about both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats.packed_layout import PackedLayout
from accessory.checkpoint.formats.stated_packing import Stated
from accessory.checkpoint.lazy import HeldTensor, LazyTensor, PackedTensor
from accessory.checkpoint.naming import Tensors
from accessory.errors import CheckpointError
from accessory.quant import STORAGES, PackedWeight
from accessory.quant.groups import GroupWeight

_STATE = ".quant_state.bitsandbytes__"


def packed_by_bitsandbytes(tensors: dict[str, LazyTensor], stated: Stated, path: Path) -> dict[str, LazyTensor]:
    """Put each packed matrix and its statistics together, unchanged.

    Raises `CheckpointError` for 8 bits, and for a matrix whose parts are missing or strange.
    """
    if not stated.config.get("load_in_4bit", stated.config.get("_load_in_4bit")):
        raise CheckpointError(
            f"{path}: is quantized by 8 bits, which cannot be read; expected 4-bit bitsandbytes (nf4 or fp4), or the "
            "full-precision checkpoint and --quant."
        )
    found = dict(tensors)
    for state_key in [key for key in tensors if _STATE in key]:
        name = state_key.partition(_STATE)[0]
        state = _state_of(name, found.pop(state_key), path)
        kind = _storage_of(name, state, path)
        suffixes = kind.IN_BITSANDBYTES.items()
        parts = {part: found.pop(f"{name}{end}") for part, end in suffixes if f"{name}{end}" in found}
        if "nested_offset" in state:
            parts["offset"] = HeldTensor(torch.tensor([float(state["nested_offset"])]))
        code, _ = (found.pop(f"{name}.{table}", None) for table in ("quant_map", "nested_quant_map"))
        if code is not None and not kind.has_codebook(code.read()):
            raise CheckpointError(f"{path}: {name} has a codebook of its own; expected {state['quant_type']}'s.")
        found[name] = PackedTensor.of(parts, kind, tuple(state["shape"]), f"{path}: {name}")
    return found


def _state_of(name: str, tensor: LazyTensor, path: Path) -> dict[str, Any]:
    try:
        state = json.loads(bytes(tensor.read().tolist()).decode())
        sizes_fit = len(state["shape"]) == 2 and all(size == int(size) > 0 for size in state["shape"])
        if not (sizes_fit and isinstance(state["quant_type"], str) and math.isfinite(state.get("nested_offset", 0))):
            raise ValueError(f"it says {state}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{path}: the quantization state of {name} cannot be read ({error}).") from error
    return state


def _storage_of(name: str, state: dict[str, Any], path: Path) -> type[PackedWeight]:
    for kind in STORAGES.values():
        if kind.reads_bitsandbytes(state):
            return kind
    sizes = [str(state[key]) for key in ("blocksize", "nested_blocksize") if key in state]
    known = ", ".join(name for name, kind in STORAGES.items() if kind.IN_BITSANDBYTES)
    raise CheckpointError(
        f"{path}: {name} is packed as {state['quant_type']} in blocks of {' and '.join(sizes)}; expected one of "
        f"{known}, in blocks as large as bitsandbytes makes them by default."
    )


def bitsandbytes_layout(theirs: Tensors, linears: set[str], target: Path, dtype: torch.dtype) -> PackedLayout:
    """How to write the packed matrices among `theirs`, to be unpacked to `dtype`.

    Raises `CheckpointError` for a storage that bitsandbytes has not, and for rows in another order than in their file.
    """
    packed = {name: tensor for name, tensor in theirs.items() if isinstance(tensor, PackedTensor)}
    for tensor in packed.values():
        if not tensor.storage.IN_BITSANDBYTES:
            known = ", ".join(name for name, kind in STORAGES.items() if kind.IN_BITSANDBYTES)
            raise CheckpointError(
                f"{target}: {tensor.storage.name} matrices have no place in Hugging Face files: bitsandbytes, in whose "
                "layout they are packed there, has no such format. Pack the full-precision checkpoint as one of "
                f"{known}, or write it --to accessory{_whole_numbers(tensor)}."
            )
    if selected := [name for name, tensor in packed.items() if tensor.rows is not None]:
        raise relaid(selected)
    kind = next((tensor.storage for tensor in packed.values()), None)
    config = {} if kind is None else {"quantization_config": _quantization_config(kind, dtype)}
    return PackedLayout(lambda name, tensor: _tensors(name, tensor, dtype), config)


def relaid(names: list[str]) -> CheckpointError:
    """The error for packed matrices whose rows would have to lie otherwise."""
    return CheckpointError(
        f"{', '.join(names[:4])}: packed rows cannot be laid out anew without loss. Quantize the "
        "full-precision checkpoint into this format instead (tools/quantize.py BASE TARGET --to hf)."
    )


def _whole_numbers(tensor: PackedTensor) -> str:
    return ", gptq, awq or greenbit" if issubclass(tensor.storage, GroupWeight) else ""


def _tensors(name: str, tensor: PackedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{name}{suffix}": value for suffix, value in tensor.read_matrix().as_bitsandbytes(dtype).items()}


def _quantization_config(kind: type[PackedWeight], dtype: torch.dtype) -> dict[str, Any]:
    """The quantization_config of matrices packed as `kind`, to be unpacked to `dtype`."""
    return {
        "quant_method": "bitsandbytes",
        **kind.bitsandbytes_config(dtype),
        "llm_int8_skip_modules": ["lm_head", "embed_out", "output", "output_layer", "project_in", "project_out"],
    }
