"""Writes Meta's and LLaMA2-Accessory's `.pth` checkpoints, cut over any number of tensor-parallel ranks."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from accessory.checkpoint.formats.torch_shards import shard_dim
from accessory.checkpoint.lazy import LazyTensor, zeros
from accessory.checkpoint.save import fresh_directory, write_json
from accessory.checkpoint.whole import WholeModel, progress, read_as, refuse_existing
from accessory.errors import ParallelError
from accessory.model.args import ModelArgs
from accessory.model.families import ARCHITECTURES
from accessory.model.families.architecture import inexpressible

Flavour = Literal["meta", "upstream"]
_BIASED = ("attention.wq", "attention.wk", "attention.wv", "attention.wo",
           "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")  # fmt: skip


def write_torch_shards(model: WholeModel, target: Path, dtype: torch.dtype, flavour: Flavour, ranks: int) -> None:
    """Write `consolidated.NN.pth` ("meta") or `consolidated.NN-of-MM.model.pth` ("upstream") for `ranks` ranks.

    Only LLaMA2-Accessory's have biases. A shard is made in memory-mapped files, so that the process itself stays small.
    Raises `CheckpointError` for a model that is not LLaMA's block, `ParallelError` for a number of ranks that does not
    divide it.
    """
    refuse_existing(target)
    model = model.in_layout("pairs")
    params = meta_settings(model.args, flavour)
    model.args.check_model_parallel(ranks)
    if model.args.vocab_size % ranks or model.args.dim % ranks:
        raise ParallelError(f"{ranks} shards do not divide {model.args.vocab_size} tokens and width {model.args.dim}.")
    tensors = _with_whole_places(model, flavour)
    with fresh_directory(target) as directory:
        for rank in range(ranks):
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                state = _shard(tensors, dtype, rank, ranks, Path(scratch))
                if flavour == "meta":
                    torch.save(state, directory / f"consolidated.{rank:02d}.pth")
                else:
                    named = {f"llma.{name}": tensor for name, tensor in state.items()}
                    torch.save({"model": named}, directory / f"consolidated.{rank:02d}-of-{ranks:02d}.model.pth")
                del state
        write_json(directory / ("params.json" if flavour == "meta" else "config.json"), params)
        if flavour == "upstream":
            write_json(directory / "meta.json", {"llama_type": "llama_peft" if _has_biases(model.args) else "llama"})
        model.tokenizer.save(directory)


def _has_biases(args: ModelArgs) -> bool:
    return args.qkv_bias or args.out_bias or args.mlp_bias


def meta_settings(args: ModelArgs, flavour: Flavour) -> dict[str, Any]:
    """A params.json for `args`. Raises `CheckpointError` naming the settings it cannot express."""
    width = int(8 * args.dim / 3)
    multiple = next(m for m in (256, 128, 64, 32, 16, 8, 4, 2, 1) if args.hidden_dim % m == 0)
    params: dict[str, Any] = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "multiple_of": multiple,
        # Rounded down by its user, then up to the multiple; a quotient a hair too small would lose one.
        "ffn_dim_multiplier": math.nextafter(args.hidden_dim / width, math.inf),
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
    }
    if args.rope_scaling and args.rope_scaling.kind == "linear":
        params["rope_scaling"] = 1.0 / args.rope_scaling.factor
    elif args.rope_scaling:
        params["use_scaled_rope"] = True
    reread = ModelArgs(**params)
    placed = {"tie_word_embeddings", "max_seq_len"} | (
        {"qkv_bias", "out_bias", "mlp_bias"} if flavour == "upstream" else set()
    )
    if lost := [name for name in ARCHITECTURES["llama"].lost(args, reread) if name not in placed]:
        raise inexpressible(f"A params.json of {flavour}", lost, args)
    return params


def _with_whole_places(model: WholeModel, flavour: Flavour) -> dict[str, LazyTensor]:
    """All that these files must hold: a head of its own, and a bias in every linear or in none."""
    tensors = dict(model.tensors)
    if model.args.tie_word_embeddings:
        tensors["output.weight"] = tensors["tok_embeddings.weight"]
    if flavour == "upstream" and _has_biases(model.args):
        for i in range(model.args.n_layers):
            for module in _BIASED:
                name = f"layers.{i}.{module}"
                tensors.setdefault(f"{name}.bias", zeros(tensors[f"{name}.weight"].shape[0]))
    return tensors


def _shard(
    tensors: dict[str, LazyTensor], dtype: torch.dtype, rank: int, ranks: int, scratch: Path
) -> dict[str, Tensor]:
    """One rank's slices, each in a mapped file of `scratch`."""
    state = {}
    for i, (name, tensor) in enumerate(progress(tensors, f"shard {rank + 1} of {ranks}")):
        dim = shard_dim(name) if ranks > 1 else None
        if dim is None:
            values = read_as(tensor, dtype)
        else:
            step = tensor.shape[dim] // ranks
            values = tensor.read(dim, rank * step, (rank + 1) * step)
        state[name] = _mapped(values, dtype, scratch / str(i))
    return state


def _mapped(values: Tensor, dtype: torch.dtype, file: Path) -> Tensor:
    place = torch.from_file(str(file), shared=True, size=values.numel(), dtype=dtype)
    return place.view(values.shape).copy_(values)
