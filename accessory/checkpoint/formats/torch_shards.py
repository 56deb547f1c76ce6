"""`.pth` checkpoints cut over tensor-parallel ranks: Meta's `consolidated.NN.pth` and LLaMA2-Accessory's."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.lazy import LazyTensor, ShardedTensor
from accessory.checkpoint.source import Source, stated_llama_type, stated_settings
from accessory.errors import CheckpointError
from accessory.tokenizer.sniff import what_is

META_FILE = re.compile(r"consolidated\.(\d+)\.pth")
UPSTREAM_FILE = re.compile(r"consolidated\.(\d+)-of-(\d+)\.model\.pth")
DIFFERENCE_FILE = re.compile(r"consolidated\.(\d+)-of-(\d+)\.model-diff\.pth")
FORMATS = {UPSTREAM_FILE: "LLaMA2-Accessory", DIFFERENCE_FILE: "LLaMA2-Accessory (difference)", META_FILE: "Meta"}

_COLUMN = re.compile(r"\.(wq|wk|wv|w1|w3)\.(weight|bias|lora_b\.weight)$|^output\.weight$")
_NEEDLESS = re.compile(r"rope\.freqs|rotary_emb\.inv_freq")
_ROW = re.compile(r"\.(wo|w2)\.(weight|lora_a\.weight)$")


def open_shards(path: Path) -> Source | None:
    """Open a directory of Meta's or LLaMA2-Accessory's; None for one that is neither."""
    for pattern, name in FORMATS.items():
        if shards := torch_shards(path, pattern):
            tensors = open_torch_shards(shards)
            is_difference = pattern is DIFFERENCE_FILE
            return Source(
                path,
                name,
                shards,
                tensors,
                stated_settings(path),
                stated_llama_type(path),
                is_delta=is_difference or "tok_embeddings.weight" not in tensors,
                is_difference=is_difference,
            )
    return None


def torch_shards(directory: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The shards of `directory` whose names fit, in rank order; none where there are none.

    Raises `CheckpointError` for an incomplete set.
    """
    found = {p: m for p in directory.glob("consolidated.*.pth") if (m := pattern.fullmatch(p.name))}
    shards = sorted(found, key=lambda p: int(found[p][1]))
    present = f"found {', '.join(p.name for p in shards)}"
    ranks = [int(found[p][1]) for p in shards]
    totals = {int(m[2]) for m in found.values() if m.re.groups == 2} or {max(ranks, default=-1) + 1}
    if missing := sorted(set(range(max(totals))) - set(ranks)):
        raise CheckpointError(f"{directory}: shards {missing} are missing; {present}.")
    if len(totals) > 1 or len(ranks) > max(totals):
        raise CheckpointError(f"{directory}: {present}; expected the shards of one checkpoint.")
    return shards


def open_torch_shards(shards: list[Path]) -> dict[str, LazyTensor]:
    """Our name -> tensor, joined lazily over the shards. Memory-mapped, and loaded without unpickling any code."""
    states = [_named_as_ours(load_torch_file(path)) for path in shards]
    names = set().union(*states)
    incomplete = sorted(name for name in names if any(name not in state for state in states))
    if incomplete:
        raise CheckpointError(f"{shards[0].parent}: not every shard holds {', '.join(incomplete[:5])}.")
    tensors = {}
    for name in states[0]:
        pieces = [state[name] for state in states]
        tensors[name] = ShardedTensor(pieces, _shard_dim_in(name, states[0]) if len(pieces) > 1 else None)
    return tensors


def shard_dim(name: str) -> int | None:
    """The dimension along which LLaMA 1's and 2's files cut a tensor of ours; None for what each holds whole."""
    if _COLUMN.search(name):
        return 0
    return 1 if _ROW.search(name) or name in ("tok_embeddings.weight", "prefix_gate") else None


def _shard_dim_in(name: str, state: dict[str, Tensor]) -> int | None:
    head = state.get("output.weight")
    if name == "tok_embeddings.weight" and head is not None and state[name].shape == head.shape:
        return 0  # Llama 3 cuts the embedding's rows, as the head's always are
    return shard_dim(name)


def load_torch_file(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch.save file, memory-mapped, without unpickling any code.

    Raises `CheckpointError` for a file that is damaged, or holds more than tensors.
    """
    state = _loaded(path)
    if isinstance(state, dict):
        state = state.get("model", state)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; expected a dictionary of tensors.")
    if alien := [f"{name!r} ({type(its).__name__})" for name, its in state.items() if not isinstance(its, Tensor)]:
        raise CheckpointError(f"{path}: expected a dictionary of tensors, but found {', '.join(alien[:5])}.")
    return state


def load_torch_tensor(path: Path) -> Tensor:
    """The one tensor of a torch.save file, a parameter or not, otherwise as `load_torch_file`."""
    found = _loaded(path)
    if not isinstance(found, Tensor):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}; expected one tensor.")
    return found.detach()


def _loaded(path: Path) -> object:
    try:
        # Files older than torch 1.6 are no zip archives, and cannot be mapped.
        return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except Exception as error:  # torch raises a dozen unrelated types for a damaged file
        details = str(error).splitlines()[0] if str(error) else "no details"
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch checkpoint of plain tensors: found {what_is(path)}. "
            f"It may be truncated or hold more than tensors ({details})."
        ) from error


def _named_as_ours(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without LLaMA2-Accessory's prefix, and without tensors that are no weights."""
    return {name.removeprefix("llma."): tensor for name, tensor in state.items() if not _NEEDLESS.search(name)}
