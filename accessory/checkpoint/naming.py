"""Translates tensors between another format and ours: names, fused matrices, and the order of rotary channels."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from accessory.checkpoint.lazy import LazyTensor, StackedRows
from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs
from accessory.model.families.architecture import Fused, Names

Tensors = dict[str, LazyTensor]
BLOCK_LINEAR = re.compile(r"layers\.\d+\.(?:attention\.w[qkvo]|feed_forward\.w[123])\.weight")
"""Our names of the matrices that storage formats apply to."""
_ROTATED = re.compile(
    r"layers\.\d+\.attention\.(?:(wq|wk)\.(?:weight(?:\.\w+)?|bias|scale|lora_b\.weight)|([qk]_norm)\.weight)"
)
"""Of the base's blocks; a side network's channels are in one layout always."""


def part_rows(fused: Fused, args: ModelArgs) -> list[Tensor]:
    """For each of our matrices in a fused one, the rows it has there: int64 [its rows]."""
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    sizes = {"wq": q, "wk": kv, "wv": kv, "w1": args.hidden_dim, "w3": args.hidden_dim}
    groups = {"whole": 1, "heads": args.n_heads, "kv_heads": args.n_kv_heads}[fused.groups]
    widths = [sizes[part.rsplit(".", 1)[-1]] // groups for part in fused.parts]
    starts = torch.arange(groups)[:, None] * sum(widths)
    found, offset = [], 0
    for width in widths:
        found.append((starts + offset + torch.arange(width)).flatten())
        offset += width
    return found


def ours_from_theirs(tensors: Mapping[str, LazyTensor], names: Names, args: ModelArgs, source: str) -> Tensors:
    """Their tensors under our names, fused ones taken apart. A name that means nothing to us is kept as it is.

    Raises `CheckpointError` for a fused matrix of a size that does not fit the settings, and for what is there twice.
    """
    ours: Tensors = {}
    for key, tensor in tensors.items():
        if names.is_needless(key):
            continue
        found = names.ours(key)
        if found is None:
            its = {key: tensor}
        elif isinstance(found[0], str):
            its = {f"{found[0]}.{found[1]}": tensor}
        else:
            its = _taken_apart(key, tensor, *found, args, source)
        if twice := its.keys() & ours.keys():
            raise CheckpointError(f"{source}: holds {sorted(twice)[0]} twice, once as {key}.")
        ours |= its
    if args.tie_word_embeddings:
        ours.pop("output.weight", None)
    return ours


def _taken_apart(key: str, tensor: LazyTensor, fused: Fused, leaf: str, args: ModelArgs, source: str) -> Tensors:
    rows = part_rows(fused, args)
    expected = sum(map(len, rows))
    if tensor.shape[:1] != (expected,):
        raise CheckpointError(f"{source}: {key} has shape {tensor.shape}; its settings ask for {expected} rows.")
    return {f"{part}.{leaf}": tensor.select(its) for part, its in zip(fused.parts, rows, strict=True)}


def theirs_from_ours(tensors: Mapping[str, LazyTensor], names: Names, args: ModelArgs) -> Tensors:
    """Our tensors under their names, in file order, fused ones put together.

    Raises `CheckpointError` naming those they have no place for, and those that lack what they are fused with.
    """
    theirs: Tensors = {}
    homeless, lonely = [], []
    for name in sorted(tensors, key=_file_order):
        module, _, leaf = name.rpartition(".")
        found = names.theirs(module)
        if found is None:
            homeless.append(name)
        elif isinstance(found[1], str):
            theirs[f"{found[0]}.{leaf}"] = tensors[name]
        elif name == f"{found[1].parts[0]}.{leaf}":
            parts = [f"{part}.{leaf}" for part in found[1].parts]
            absent = [part for part in parts if part not in tensors]
            lonely += absent
            if not absent:
                stacked = StackedRows(tuple(tensors[part] for part in parts), tuple(part_rows(found[1], args)))
                theirs[f"{found[0]}.{leaf}"] = stacked
    if homeless or lonely:
        said = [f"there is no place for {', '.join(homeless[:8])}"] if homeless else []
        said += [f"{', '.join(lonely[:8])} is missing"] if lonely else []
        raise CheckpointError(f"In a {args.architecture} checkpoint {'; '.join(said)}.")
    return theirs


def _file_order(name: str) -> tuple[int, int, str]:
    """Embedding, blocks by number, the rest."""
    block = re.match(r"layers\.(\d+)\.", name)
    if block:
        return 1, int(block[1]), name
    return (0 if name.startswith(("tok_", "pos_", "project_in")) else 2), 0, name


def rotary_rows(heads: int, head_dim: int, rotary_dim: int, wanted: str) -> Tensor:
    """For each row of the `wanted` layout, its row in the other one: int64 [heads * head_dim].

    "pairs" rotates channels 2i and 2i + 1 of a head's first `rotary_dim` together, "halves" i and i + rotary_dim / 2.
    """
    channels = torch.arange(rotary_dim)
    reordered = channels.view(2, -1).t() if wanted == "pairs" else channels.view(-1, 2).t()
    head = torch.cat([reordered.flatten(), torch.arange(rotary_dim, head_dim)])
    return (torch.arange(heads)[:, None] * head_dim + head).flatten()


def in_rotary_layout(tensors: Mapping[str, LazyTensor], args: ModelArgs, current: str, wanted: str) -> Tensors:
    """The same model with its blocks' q and k in another rotary layout; `current` is the one `tensors` are in."""
    if args.position != "rotary" or current == wanted:
        return dict(tensors)
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads, "q_norm": 1, "k_norm": 1}
    return {
        name: tensor.select(rotary_rows(heads[match[1] or match[2]], args.head_dim, args.rotary_dim, wanted))
        if (match := _ROTATED.fullmatch(name))
        else tensor
        for name, tensor in tensors.items()
    }
