"""Writes a trained part as a PEFT LoRA directory, which `peft.PeftModel.from_pretrained` loads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.formats.peft_adapter import PARTS_KEY, WEIGHT_FILES, without_number
from accessory.checkpoint.formats.peft_config import CONFIG_FILE
from accessory.checkpoint.formats.peft_places import PREFIX, Places, TheirLinear, places_of
from accessory.checkpoint.load import named_generator
from accessory.checkpoint.naming import Tensors, in_rotary_layout, theirs_from_ours
from accessory.checkpoint.save import fresh_directory, write_json
from accessory.checkpoint.source import Source
from accessory.checkpoint.whole import read_as, refuse_existing
from accessory.errors import CheckpointError
from accessory.method.peft import Peft, truncated_normal
from accessory.model.args import ModelArgs
from accessory.model.families import Architecture, architecture_of

_SHOWN = 8  # names listed per fault
_FACTOR = re.compile(r"(.+)\.lora_[ab]\.weight")
Shared = dict[str, tuple[str, ...]]
"""Their linear -> the linears of ours in it that have LoRA, which share its rank out in equal parts."""


def write_adapter(
    source_delta: Source,
    base_args: ModelArgs,
    settings: Peft.Settings,
    target: Path,
    *,
    base_path: str,
    drop_biases: bool = False,
) -> None:
    """Write the trained part `source_delta` (of the method `settings`, on a base of `base_args`) as a PEFT directory.

    LoRA, norms through modules_to_save, biases where the Hugging Face model has them through bias="all"; fp32; whole
    or not at all. `base_path` goes into the config as the base. Raises `CheckpointError` for tensors that are none of
    these, do not fit, or are biases that the base has no place for, which `drop_biases` leaves out.
    """
    refuse_existing(target)
    architecture = architecture_of(base_args.architecture, str(target))
    places = places_of(base_args, architecture.names)
    layout = architecture.fixed.get("rotary_layout", base_args.rotary_layout)
    tensors = in_rotary_layout(source_delta.tensors, base_args, source_delta.rotary_layout, layout)
    _check(tensors, places, settings.lora_rank, source_delta)
    tensors = _without_homeless_biases(tensors, places, source_delta.path, drop_biases)
    shared = _shared(tensors, places)
    plain = {name: tensor for name, tensor in tensors.items() if not _FACTOR.fullmatch(name)}
    biases = any(name not in places.norms for name in plain)
    config = _lora_config(settings, shared) | {
        "base_model_name_or_path": base_path,
        "bias": "all" if biases else "none",
        "modules_to_save": _modules_to_save(plain, places, architecture, base_args),
        "layers_to_transform": _some_layers(shared, base_args.n_layers),
    }
    theirs = theirs_from_ours(plain, architecture.names, base_args)
    with fresh_directory(target) as directory:
        written = dict(_plain_tensors(theirs, shared)) | dict(_factors(tensors, places, shared, settings.lora_rank))
        save_file(written, directory / WEIGHT_FILES[0], metadata={"format": "pt", PARTS_KEY: _parts(shared)})
        write_json(directory / CONFIG_FILE, config)


def _check(tensors: Tensors, places: Places, rank: int, delta: Source) -> None:
    expected: dict[str, tuple[int, ...]] = {name: (size,) for name, size in places.norms.items()}
    for name, (out, width) in places.linears.items():
        expected[f"{name}.bias"] = (out,)
        expected |= {f"{name}.lora_a.weight": (rank, width), f"{name}.lora_b.weight": (out, rank)}
    if alien := [name for name in tensors if name not in expected]:
        raise CheckpointError(
            f"{delta.path}: {', '.join(alien[:_SHOWN])} is no LoRA factor, norm or bias of this base; a PEFT adapter "
            "holds nothing else. Merge the trained part into its base instead."
        )
    misfits = [f"{name} has shape {tensor.shape}, expected {expected[name]}."
               for name, tensor in tensors.items() if tensor.shape != expected[name]]  # fmt: skip
    lone = {f"{match[1]}.lora_{side}.weight" for name in tensors if (match := _FACTOR.fullmatch(name)) for side in "ab"}
    misfits += [f"{name} is missing." for name in sorted(lone - tensors.keys())]
    if misfits:
        raise CheckpointError(
            f"{delta.path}: does not fit the base or lora_rank {rank}.\n" + "\n".join(misfits[:_SHOWN])
        )


def _without_homeless_biases(tensors: Tensors, places: Places, path: Path, drop: bool) -> Tensors:
    """Leave out biases that the base has no place for: zeros silently, others only with `drop`."""
    homeless = [name for name in places.linears if f"{name}.bias" in tensors and name not in places.biased]
    trained = [name for name in homeless if tensors[f"{name}.bias"].read().any()]
    if trained and not drop:
        kinds = ", ".join(dict.fromkeys(without_number(name) for name in trained))
        raise CheckpointError(
            f"{path}: the base has no bias on {kinds}, so PEFT has no place for the {len(trained)} trained there. "
            "--drop_biases leaves them out, which changes what was trained; merging into the base keeps them."
        )
    return {name: tensor for name, tensor in tensors.items() if name.removesuffix(".bias") not in homeless}


def _shared(tensors: Tensors, places: Places) -> Shared:
    shared = {
        name: tuple(part for part in linear.parts if f"{part}.lora_a.weight" in tensors)
        for name, linear in places.theirs.items()
    }
    if any(shared.values()):
        return {name: parts for name, parts in shared.items() if parts}
    # PEFT wants LoRA somewhere: where none was trained, a new one of rank 1 on one kind of linear, which adds nothing.
    return {name: () for name, linear in places.theirs.items() if linear.parts[0].endswith(".wo")}


def _some_layers(shared: Shared, n_layers: int) -> list[int] | None:
    """The blocks that have LoRA, None for all."""
    numbers = {int(re.search(r"\.(\d+)\.", name)[1]) for name in shared}
    return sorted(numbers) if len(numbers) < n_layers else None


def _parts(shared: Shared) -> str:
    """What the file's header says of `shared`, for reading it back as it was."""
    kinds = {without_number(name): [part.rsplit(".", 1)[-1] for part in parts] for name, parts in shared.items()}
    return json.dumps(kinds)


def _lora_config(settings: Peft.Settings, shared: Shared) -> dict[str, Any]:
    """Everything of adapter_config.json that concerns LoRA; a module of n of our linears has n times the rank."""
    rank = max(settings.lora_rank, 1)
    alpha = settings.lora_scale * rank if settings.lora_rank > 0 else 1.0
    counts = {name.rsplit(".", 1)[-1]: len(parts) for name, parts in shared.items()}
    several = {leaf: count for leaf, count in counts.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": settings.lora_dropout,
        "target_modules": sorted(counts),
        "rank_pattern": {leaf: rank * count for leaf, count in several.items()},
        "alpha_pattern": {leaf: _whole(alpha * count) for leaf, count in several.items()},
        "use_rslora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _whole(number: float) -> float | int:
    """An integer where it is one: PEFT declares alpha so."""
    return int(number) if float(number).is_integer() else number


def _modules_to_save(plain: Tensors, places: Places, architecture: Architecture, args: ModelArgs) -> list[str] | None:
    """Names of the trained norms, which PEFT matches against the ends of modules' names."""
    norms = {name: tensor for name, tensor in plain.items() if name in places.norms}
    modules = {name.rpartition(".")[0] for name in theirs_from_ours(norms, architecture.names, args)}
    if len(norms) == len(places.norms):  # a short name may stand for any of them
        modules = {name.rsplit(".", 1)[-1] for name in modules}
    return sorted(modules) or None


def _plain_tensors(theirs: Tensors, shared: Shared) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in theirs.items():
        module, _, leaf = name.rpartition(".")
        inner = ".base_layer" if module in shared else ""  # PEFT puts a wrapper around what has LoRA
        yield f"{PREFIX}{module}{inner}.{leaf}", read_as(tensor, torch.float32)


def _factors(tensors: Tensors, places: Places, shared: Shared, rank: int) -> Iterator[tuple[str, Tensor]]:
    for name, parts in shared.items():
        linear = places.theirs[name]
        a, b = _stacked(tensors, linear, parts, rank) if parts else _nothing(linear)
        yield f"{PREFIX}{name}.lora_A.weight", a
        yield f"{PREFIX}{name}.lora_B.weight", b


def _stacked(tensors: Tensors, linear: TheirLinear, parts: tuple[str, ...], rank: int) -> tuple[Tensor, Tensor]:
    """A [n R, in], one part's below the other's, and B [out, n R], each part's in its rows and columns."""
    a = torch.cat([read_as(tensors[f"{part}.lora_a.weight"], torch.float32) for part in parts])
    b = torch.zeros(linear.out_features, len(a))
    for i, part in enumerate(parts):
        rows = linear.rows[linear.parts.index(part)]
        b[rows, i * rank : (i + 1) * rank] = tensors[f"{part}.lora_b.weight"].read().float()
    return a, b


def _nothing(linear: TheirLinear) -> tuple[Tensor, Tensor]:
    a = truncated_normal(1, linear.in_features)(named_generator(0, linear.name))  # zeros could never learn
    return a, torch.zeros(linear.out_features, 1)
