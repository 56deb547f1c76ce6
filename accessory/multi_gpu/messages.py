"""Values on their way between processes, as JSON and safetensors: nothing that is received can run code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from accessory.data.templates import DialogPrompt
from accessory.errors import ConfigError

TOKENIZER = "tokenizer"
"""The request for the tokenizer's files."""
_TENSOR, _BYTES, _DIALOG = "//tensor", "//bytes", "//dialog"
"""Keys of the objects that stand for a tensor, for bytes, and for a prompt in the dialog layout."""
_LENGTH_BYTES = 8


def pack(value: Any) -> bytes:
    """Texts, numbers, None, lists and mappings of them, tensors, bytes and prompts; paths, dtypes, devices become text.

    Raises `ConfigError` for any other value.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    return len(text).to_bytes(_LENGTH_BYTES) + text + save(tensors)


def unpack(message: bytes) -> Any:
    """What was packed, tensors on the CPU and tuples as lists."""
    end = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES])
    tensors = load(message[end:])

    def made(entry: dict[str, Any]) -> Any:
        """The tensor, bytes or prompt that a JSON object stands for; another object as it is."""
        if _TENSOR in entry:
            return tensors[entry[_TENSOR]]
        if _BYTES in entry:
            return tensors[entry[_BYTES]].numpy().tobytes()
        return DialogPrompt(tuple(entry[_DIALOG])) if _DIALOG in entry else entry

    return json.loads(message[_LENGTH_BYTES:end], object_hook=made)


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach().cpu().contiguous()
        return {_TENSOR: str(len(tensors) - 1)}
    if isinstance(value, bytes):
        tensors[str(len(tensors))] = torch.frombuffer(bytearray(value), dtype=torch.uint8)
        return {_BYTES: str(len(tensors) - 1)}
    if isinstance(value, DialogPrompt):
        return {_DIALOG: list(value.pieces)}
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(part, tensors) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, tensors) for part in value]
    raise ConfigError(
        f"{value!r:.80} cannot be handed to the processes of a MultiGpuWrapper; expected texts, numbers, "
        "bytes, lists, mappings or tensors."
    )
