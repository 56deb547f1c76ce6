"""How bitsandbytes lays 4-bit matrices into Hugging Face files: bytes, their statistics, and a JSON text on them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from accessory.checkpoint.lazy import HeldTensor, LazyTensor, PackedTensor
from accessory.errors import CheckpointError
from accessory.quant import STORAGES
from accessory.quant.four_bit import BLOCK, NESTED_BLOCK, codebook_of

_STATE = ".quant_state.bitsandbytes__"


def packed_by_bitsandbytes(tensors: dict[str, LazyTensor], stated: Any, path: Path) -> dict[str, LazyTensor]:
    """Take each packed matrix and its statistics together, as they are; `stated` is config.json's quantization_config.

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
        parts = {"codes": found.pop(name, None), "scales": found.pop(f"{name}.absmax", None)}
        code = found.pop(f"{name}.quant_map", None)
        if "nested_offset" in state:
            found.pop(f"{name}.nested_quant_map", None)
            parts["nested_scales"] = found.pop(f"{name}.nested_absmax", None)
            parts["offset"] = HeldTensor(torch.tensor([float(state["nested_offset"])]))
        if absent := [part for part, tensor in parts.items() if tensor is None]:
            raise CheckpointError(f"{path}: {name} is packed, but its {', '.join(absent)} is missing.")
        _check_state(name, state, code, path)
        found[name] = PackedTensor.of(parts, state["quant_type"], tuple(state["shape"]), f"{path}: {name}")
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


def _check_state(name: str, state: dict[str, Any], code: LazyTensor | None, path: Path) -> None:
    sizes = state.get("blocksize"), state.get("nested_blocksize", NESTED_BLOCK)
    known = state["quant_type"] in ("nf4", "fp4")
    if not known or sizes != (BLOCK, NESTED_BLOCK):
        raise CheckpointError(
            f"{path}: {name} is packed as {state['quant_type']} in blocks of {sizes[0]} and {sizes[1]}; expected "
            f"nf4 or fp4 in blocks of {BLOCK} and {NESTED_BLOCK}."
        )
    known_code = codebook_of(state["quant_type"])
    if code is not None and not (
        code.shape == known_code.shape and torch.allclose(code.read().float(), known_code, atol=1e-6)
    ):
        raise CheckpointError(f"{path}: {name} has a codebook of its own; expected {state['quant_type']}'s.")


def quantization_config(quant_type: str, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of matrices packed as `quant_type`, to be unpacked to `dtype`."""
    settings = STORAGES[quant_type].keywords
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": settings["quant_type"],
        "bnb_4bit_use_double_quant": settings["nested"],
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ["lm_head", "embed_out", "output", "output_layer", "project_in", "project_out"],
    }
