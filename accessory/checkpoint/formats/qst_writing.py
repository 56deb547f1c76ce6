"""Writes a trained side network as the published QST code's `save_qst_state` does, for its `load_qst_state`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from accessory.checkpoint.formats.qst import (
    ADAPTER,
    DOWNSAMPLES,
    FINAL_GATES,
    GATES,
    LAYERS,
    NORM,
    UPSAMPLE,
    inner_modules,
)
from accessory.checkpoint.naming import Tensors
from accessory.checkpoint.save import fresh_directory
from accessory.checkpoint.whole import read_as, refuse_existing
from accessory.errors import CheckpointError
from accessory.method.side_settings import SideSettings, side_args
from accessory.model.args import ModelArgs
from accessory.model.families import architecture_of

_THEIR_ACTIVATIONS = {"silu": "swish", "gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
_THEIR_ADAPTER = {our: their for their, our in ADAPTER.items()}


def write_qst(tensors: Tensors, args: ModelArgs, settings: SideSettings, target: Path, source: Path) -> None:
    """Write the side network `tensors`, of `settings` beside a base of `args`, into the new directory `target`; fp32.

    Whole or not at all. source: what it is called in messages. Raises `CheckpointError` naming every setting that the
    published form cannot express.
    """
    refuse_existing(target)
    if faults := _inexpressible(args, settings):
        raise CheckpointError(f"{source}: the published QST code cannot express {'; '.join(faults)}.")
    files = _theirs(tensors, args)
    with fresh_directory(target) as directory:
        for name, content in files.items():
            torch.save(content, directory / name)


def published_config(settings: SideSettings) -> str:
    """The `QSTConfig(...)` to give to the published code, which does not save it."""
    values = {
        "r": settings.r,
        "alpha_r": settings.r,
        "peft_hidden_size": settings.peft_hidden_size,
        "activation": _THEIR_ACTIVATIONS[settings.adapter_activation],
        "add_layer_norm_before_adapter": settings.add_layer_norm_before_adapter,
        "add_layer_norm_after_adapter": settings.add_layer_norm_after_adapter,
        "dropout": settings.dropout,
    }
    return f"QSTConfig({', '.join(f'{name}={value!r}' for name, value in values.items())})"


def _inexpressible(args: ModelArgs, settings: SideSettings) -> list[str]:
    """A phrase for each setting that has no place there."""
    wanted = {"start": "released", "downsample": "adapter", "embedding_downsample": "shared", "gate": "vector",
              "side_layers": 1, "tail": 0}  # fmt: skip
    found = [f"{name} {getattr(settings, name)!r} (only {value!r})" for name, value in wanted.items()
             if getattr(settings, name) != value]  # fmt: skip
    if args.architecture not in FINAL_GATES:
        found.append(f"architecture {args.architecture!r} (only {' and '.join(FINAL_GATES)})")
    elif args.architecture == "llama":
        found += [f"{name} (its layers have no biases)" for name in ("qkv_bias", "out_bias", "mlp_bias")
                  if getattr(args, name)]  # fmt: skip
    elif not args.final_norm or args.embedding_dim != args.dim:
        found.append(f"an OPT with final_norm {args.final_norm} and embedding_dim {args.embedding_dim}")
    if settings.side_heads is not None:
        narrow = side_args(args, settings)
        if (narrow.n_heads, narrow.n_kv_heads) != (args.n_heads, args.n_kv_heads):
            only = f"the base's {args.n_heads}, and {args.n_kv_heads} of keys and values"
            found.append(f"side_heads {settings.side_heads} (only {only})")
    return found


def _theirs(tensors: Tensors, args: ModelArgs) -> dict[str, dict[str, Tensor] | Tensor]:
    """File -> what it holds."""
    inner = {our: their for their, our in inner_modules(architecture_of(args.architecture, "architecture")).items()}
    files: dict[str, dict[str, Tensor] | Tensor] = {name: {} for name in (LAYERS, GATES, DOWNSAMPLES, NORM, UPSAMPLE)}
    modules: dict[str, tuple[str, Mapping[str, str]]] = {
        "side": (LAYERS, inner), "downsample": (DOWNSAMPLES, _THEIR_ADAPTER),
    }  # fmt: skip
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        number, _, within = rest.partition(".")
        value = read_as(tensor, torch.float32)
        if kind in modules:
            file, theirs = modules[kind]
            module, _, leaf = within.rpartition(".")
            files[file][f"{number}.{theirs[module]}.{leaf}"] = value
        elif kind == "gates":
            files[GATES][number] = value
        elif kind == "final_gate":
            files[FINAL_GATES[args.architecture]] = -value if args.architecture == "opt" else value
        else:
            files[{"side_norm": NORM, "upsample": UPSAMPLE}[kind]][rest] = value
    return files
