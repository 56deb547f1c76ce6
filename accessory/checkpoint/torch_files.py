"""`.pth` checkpoints cut over tensor-parallel ranks: Meta's `consolidated.NN.pth` and LLaMA2-Accessory's."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.lazy import LazyTensor, ShardedTensor
from accessory.errors import CheckpointError
from accessory.model.families import llama
from accessory.tokenizer.sniff import what_is

META_FILE = re.compile(r"consolidated\.(\d+)\.pth")
UPSTREAM_FILE = re.compile(r"consolidated\.(\d+)-of-(\d+)\.model\.pth")

_COLUMN = re.compile(r"\.(wq|wk|wv|w1|w3)\.(weight|bias|lora_b\.weight)$|^output\.weight$")
_ROW = re.compile(r"\.(wo|w2)\.(weight|lora_a\.weight)$")


def torch_shards(directory: Path) -> list[Path]:
    """The `.pth` shards of `directory` in rank order; empty where there are none. Raises for an incomplete set."""
    found = {p: m for p in directory.glob("consolidated.*.pth") if (m := UPSTREAM_FILE.fullmatch(p.name))}
    found = found or {p: m for p in directory.glob("consolidated.*.pth") if (m := META_FILE.fullmatch(p.name))}
    shards = sorted(found, key=lambda p: int(found[p][1]))
    present = f"found {', '.join(p.name for p in shards)}"
    ranks = [int(found[p][1]) for p in shards]
    totals = {int(m[2]) for m in found.values() if m.re is UPSTREAM_FILE} or {max(ranks, default=-1) + 1}
    if missing := sorted(set(range(max(totals))) - set(ranks)):
        raise CheckpointError(f"{directory}: shards {missing} are missing; {present}.")
    if len(totals) > 1 or len(ranks) > max(totals):
        raise CheckpointError(f"{directory}: {present}; expected the shards of one checkpoint.")
    return shards


def open_torch_shards(shards: list[Path]) -> dict[str, LazyTensor]:
    """Our name -> tensor, joined lazily over the shards. Memory-mapped, and loaded without unpickling any code."""
    states = [_load(path) for path in shards]
    names = set().union(*states)
    incomplete = sorted(name for name in names if any(name not in state for state in states))
    if incomplete:
        raise CheckpointError(f"{shards[0].parent}: not every shard holds {', '.join(incomplete[:5])}.")
    tensors = {}
    for name in states[0]:
        pieces = [state[name] for state in states]
        tensors[name] = ShardedTensor(pieces, _shard_dim(name, states[0]) if len(pieces) > 1 else None)
    return tensors


def _shard_dim(name: str, state: dict[str, Tensor]) -> int | None:
    if _COLUMN.search(name):
        return 0
    if _ROW.search(name):
        return 1
    if name == "tok_embeddings.weight":  # LLaMA 1 and 2 cut its width, Llama 3 its rows, as the head always is
        return 0 if "output.weight" in state and state[name].shape == state["output.weight"].shape else 1
    return None


def _load(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises a dozen unrelated types for a damaged file
        details = str(error).splitlines()[0] if str(error) else "no details"
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch checkpoint of plain tensors: found {what_is(path)}. "
            f"It may be truncated or hold more than tensors ({details})."
        ) from error
    if isinstance(state, dict):
        state = state.get("model", state)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}; expected a dictionary of tensors.")
    if alien := [
        f"{name!r} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)
    ]:
        raise CheckpointError(f"{path}: expected a dictionary of tensors, but found {', '.join(alien[:5])}.")
    named = ((llama.from_upstream_name(name), tensor) for name, tensor in state.items())
    return {name: tensor for name, tensor in named if name}
