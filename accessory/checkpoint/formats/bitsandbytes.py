"""How bitsandbytes stores packed matrices in Hugging Face files: codes, statistics, and a JSON text about both."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.lazy import HeldTensor, LazyTensor, PackedTensor
from accessory.errors import CheckpointError
from accessory.quant import STORAGES, PackedWeight

_STATE = ".quant_state.bitsandbytes__"


def packed_by_bitsandbytes(tensors: dict[str, LazyTensor], stated: Any, path: Path) -> dict[str, LazyTensor]:
    """Put each packed matrix and its statistics together, unchanged; `stated` is config.json's quantization_config.

    Raises `CheckpointError` for another quantization, and for a matrix whose parts are missing or strange.
    """
    method = stated.get("quant_method") if isinstance(stated, dict) else stated
    if method != "bitsandbytes" or not stated.get("load_in_4bit", stated.get("_load_in_4bit")):
        kind = "8 bits" if method == "bitsandbytes" else f"{method!r}"
        raise CheckpointError(
            f"{path}: is quantized by {kind}, which cannot be read; expected 4-bit bitsandbytes (nf4 or fp4), or the "
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


def quantization_config(kind: type[PackedWeight], dtype: torch.dtype) -> dict[str, Any]:
    """The quantization_config of matrices packed as `kind`, to be unpacked to `dtype`."""
    return {
        "quant_method": "bitsandbytes",
        **kind.bitsandbytes_config(dtype),
        "llm_int8_skip_modules": ["lm_head", "embed_out", "output", "output_layer", "project_in", "project_out"],
    }
