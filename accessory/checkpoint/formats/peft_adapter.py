"""PEFT LoRA directories: adapter_config.json beside adapter_model.safetensors or .bin, read as a trained part."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from accessory.checkpoint.formats import hugging_face
from accessory.checkpoint.formats.peft_config import (
    CONFIG_FILE,
    MERGE_FIRST,
    SUPPORTED,
    AdapterConfig,
    read_adapter_config,
)
from accessory.checkpoint.formats.peft_factors import Factors, new_factors
from accessory.checkpoint.formats.peft_places import PREFIX, Places, places_of
from accessory.checkpoint.lazy import LazyTensor, zeros
from accessory.checkpoint.naming import Tensors, ours_from_theirs
from accessory.checkpoint.source import Source, first_file, model_args_of, read_json
from accessory.errors import CheckpointError, is_file
from accessory.method.peft import Peft
from accessory.model.args import ModelArgs
from accessory.model.families import Architecture, architecture_of
from accessory.model.families.architecture import Fused

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PARTS_KEY = "accessory_parts"
"""Entry of the safetensors header, written by `peft_writing`: their module, without its block's number -> which linears
of ours share its rank out in equal parts, first to last. PEFT ignores it, and does not save it again."""
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.default)?\.weight")
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_SHOWN = 8  # names listed per fault


def open_adapter(path: Path, base: Source | None) -> Source:
    """Open a PEFT directory as a trained part on `base`, or on the local directory that its config names.

    The tensors are in the rotary layout of the Hugging Face model. Raises `CheckpointError` for what is not plain LoRA,
    norms and biases, for names that the base's architecture lacks, and for shapes that do not fit it.
    """
    config = read_adapter_config(path / CONFIG_FILE)
    named = None if base else _named_base(path, config)
    base = base or hugging_face.open_hugging_face(named)
    args = model_args_of(base)
    if args is None:
        raise CheckpointError(
            f"{path}: an adapter is read with its base's settings, but {base.path} holds no config.json or params.json."
        )
    architecture = architecture_of(args.architecture, str(base.path))
    file = first_file(path, WEIGHT_FILES)
    stored = hugging_face.open_weight_files([file])
    adapter = _Adapter(path, config, args, architecture, places_of(args, architecture.names), _parts_in(file))
    adapter.sort(stored)
    adapter.check()
    tensors, settings, notes = adapter.as_ours()
    llama_type = architecture.family + Peft.suffix
    files = [file, path / CONFIG_FILE]  # the scale stands in the config: both make the fingerprint
    return Source(path, "PEFT adapter", files, tensors, settings, llama_type, is_delta=True, base=named, notes=notes)


def _named_base(path: Path, config: AdapterConfig) -> Path:
    named = config.base_model_name_or_path
    file = Path(named or "") / "config.json"
    if named and is_file(file) and "model_type" in read_json(file):
        return Path(named)
    said = f"its base {named!r} is no Hugging Face directory here" if named else f"its {CONFIG_FILE} names no base"
    raise CheckpointError(f"{path}: {said}; give BASE first: --pretrained_path BASE {path}.")


def _parts_in(file: Path) -> dict[str, list[str]]:
    """What our own export says of its fused modules; nothing in anybody else's file."""
    if file.suffix == ".bin":
        return {}
    with safe_open(file, framework="pt") as opened:
        header = opened.metadata() or {}
    try:
        parts = json.loads(header.get(PARTS_KEY, "{}"))
        return {str(module): [str(kind) for kind in kinds] for module, kinds in parts.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{file}: its header says {PARTS_KEY} {header[PARTS_KEY][:80]!r}; expected lists."
        ) from error


@dataclass
class _Adapter:
    """The tensors of a file by kind. `factors`: linear by their name -> A and B; `plain`: norms and biases."""

    path: Path
    config: AdapterConfig
    args: ModelArgs
    architecture: Architecture
    places: Places
    parts: dict[str, list[str]]
    factors: dict[str, dict[str, LazyTensor]] = field(default_factory=dict)
    plain: Tensors = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def sort(self, tensors: dict[str, LazyTensor]) -> None:
        """Put every tensor where it belongs, or among the refused."""
        theirs, prefix = self.places.theirs, self.architecture.names.prefix
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            if found := _FACTOR.fullmatch(name):
                # Some models' files leave out the prefix.
                if linear := theirs.get(found[1]) or theirs.get(f"{prefix}{found[1]}"):
                    self.factors.setdefault(linear.name, {})[found[2]] = tensor
                else:
                    self.refused.append(key)
            elif ".original_module." not in name:  # the base's own values, which PEFT saves beside trained biases
                self._sort_plain(key, _WRAPPER.sub("", name), tensor)

    def _sort_plain(self, key: str, name: str, tensor: LazyTensor) -> None:
        names, places = self.architecture.names, self.places
        ours = ours_from_theirs({name: tensor}, names, self.args, str(self.path))
        biases = {our for our in ours if our.endswith(".bias") and our.removesuffix(".bias") in places.linears}
        if ours and ours.keys() <= places.norms.keys() | biases:
            self.plain |= ours
        elif not names.is_needless(name):
            self.refused.append(key)

    def check(self) -> None:
        """Raise `CheckpointError` for refused tensors, for more or fewer than the config says, and for wrong shapes."""
        if foreign := [key for key in self.refused if self._is_foreign(key)]:
            named = self.config.base_model_name_or_path
            linears = ", ".join(dict.fromkeys(name.rsplit(".", 1)[-1] for name in self.places.theirs))
            raise CheckpointError(
                f"{self.path}: is for another model: {_some(_one_a_kind(foreign))} has no place in a base of type "
                f"{self.args.architecture} with {self.args.n_layers} blocks of {linears}. Give the base it was trained "
                f"on{f', which its {CONFIG_FILE} calls {named!r}' if named else ''}."
            )
        if self.refused:
            raise CheckpointError(
                f"{self.path}: {_some(_one_a_kind(self.refused))} cannot be read onto a base of type "
                f"{self.args.architecture}. {SUPPORTED} {MERGE_FIRST}"
            )
        if not (self.factors or self.plain):
            raise CheckpointError(f"{self.path}: holds no tensors; expected the LoRA that {CONFIG_FILE} names.")
        covered = {name for name in self.places.theirs if self.config.covers(name)}
        if stray := sorted(self.factors.keys() - covered):
            raise CheckpointError(f"{self.path}: holds LoRA for {_some(stray)}, which {CONFIG_FILE} does not name.")
        absent = [f"{PREFIX}{name}.lora_{side}.weight" for name in covered for side in "AB"
                  if side not in self.factors.get(name, {})]  # fmt: skip
        if absent:
            raise CheckpointError(f"{self.path}: {_some(sorted(absent))} is missing, though {CONFIG_FILE} names it.")
        if misfits := self._misfits():
            raise CheckpointError(
                f"{self.path}: this is an adapter of another rank or base.\n" + "\n".join(misfits[:_SHOWN])
            )

    def _is_foreign(self, key: str) -> bool:
        """Whether tensor `key` belongs to a module that the base's type does not have, or to a block after its last."""
        module = _WRAPPER.sub("", key.removeprefix(PREFIX)).partition(".lora_")[0].removesuffix(".weight")
        found = self.architecture.names.ours(f"{module.removesuffix('.bias')}.weight")
        part = found[0] if found else None
        number = re.match(r"layers\.(\d+)\.", part.parts[0] if isinstance(part, Fused) else part or "")
        return part is None or (number is not None and int(number[1]) >= self.args.n_layers)

    def _misfits(self) -> list[str]:
        wanted: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        for name, sides in self.factors.items():
            linear, rank = self.places.theirs[name], self.config.rank_of(name)
            shapes = {"A": (rank, linear.in_features), "B": (linear.out_features, rank)}
            wanted += [(f"{name}.lora_{side}.weight", sides[side].shape, shapes[side]) for side in "AB"]
        for name, tensor in self.plain.items():
            linear = self.places.linears.get(name.removesuffix(".bias"))
            wanted.append((name, tensor.shape, (linear[0] if linear else self.places.norms[name],)))
        return [f"{name} has shape {found}; {CONFIG_FILE} and the base ask for {expected}."
                for name, found, expected in wanted if found != expected]  # fmt: skip

    def as_ours(self) -> tuple[Tensors, dict[str, Any], tuple[str, ...]]:
        """(tensors by our names, settings in the method's terms, notes): one rank and one scale for all."""
        found = self._our_factors()
        rank = max((factors.rank for factors in found.values()), default=-1)
        scale = max((factors.scale for factors in found.values()), key=abs, default=1.0)
        kinds, layers = ({name.split(".")[place] for name in found} for place in (-1, 1))
        tensors = dict(self.plain)
        for name, shape in self.places.linears.items():
            if name.rsplit(".", 1)[-1] in kinds and name.split(".")[1] in layers:
                factors = found.get(name) or new_factors(shape, rank, scale, name)
                factors = factors.fitted(rank, scale, name)
                tensors |= {f"{name}.lora_a.weight": factors.a, f"{name}.lora_b.weight": factors.b}
        biases = any(f"{name}.bias" in self.plain for name in self.places.linears)
        if biases:
            for name in self.places.linears.keys() - self.places.biased:
                tensors.setdefault(f"{name}.bias", zeros(self.places.linears[name][0]))
        return tensors, self._settings(rank, scale, found, biases), self._notes(found, rank)

    def _notes(self, found: dict[str, Factors], rank: int) -> tuple[str, ...]:
        """What was added so that all blocks that have LoRA have it on the same linears and of the same rank."""
        kinds, layers = ({name.split(".")[place] for name in found} for place in (-1, 1))
        linears = [
            name for name in self.places.linears if name.split(".")[-1] in kinds and name.split(".")[1] in layers
        ]
        absent, lower = len(linears) - len(found), sum(factors.rank < rank for factors in found.values())
        if not (absent or lower):
            return ()
        said = [f"has no LoRA on {absent} of {len(linears)} {', '.join(sorted(kinds))}"] if absent else []
        said += [f"has a rank below {rank} on {lower}"] if lower else []
        return (f"{' and '.join(said)}: what is missing there begins as a new LoRA does, and is trained, too",)

    def _our_factors(self) -> dict[str, Factors]:
        """Our linear -> its factors, at the file's rank and scale."""
        found: dict[str, Factors] = {}
        for name, sides in self.factors.items():
            linear = self.places.theirs[name]
            whole = Factors(sides["A"], sides["B"], self.config.scale_of(name))
            shared = self.parts.get(without_number(name))
            for part, rows in zip(linear.parts, linear.rows, strict=True):
                kind = part.rsplit(".", 1)[-1]
                if shared is None or kind in shared:
                    its = whole if len(linear.parts) == 1 else whole.rows(rows)
                    found[part] = its.block(shared.index(kind), len(shared)) if shared and len(shared) > 1 else its
        return found

    def _settings(self, rank: int, scale: float, found: dict[str, Factors], biases: bool) -> dict[str, Any]:
        kinds, layers = {name.split(".")[-1] for name in found}, {int(name.split(".")[1]) for name in found}
        settings: dict[str, Any] = {
            "lora_rank": rank,
            "lora_dropout": self.config.lora_dropout,
            "norm_tuning": bool(self.plain.keys() & self.places.norms.keys()),
            "bias_tuning": biases,
            "architecture": self.args.architecture,
            "rotary_layout": self.architecture.fixed.get("rotary_layout", self.args.rotary_layout),
        }
        if kinds:
            # Dividing by the rank and multiplying again may have cost the last bits of a plain number.
            settings["lora_alpha"] = float(f"{scale * rank:.12g}")
            settings["lora_targets"] = sorted(kinds)
            if len(layers) < self.args.n_layers:
                settings["lora_layers"] = sorted(layers)
        return settings


def without_number(name: str) -> str:
    """A module's name without its block's number."""
    return re.sub(r"\.\d+\.", ".", name)


def _one_a_kind(keys: list[str]) -> list[str]:
    """The first name of each kind: numbers of blocks make no difference."""
    return sorted({without_number(key): key for key in reversed(keys)}.values())


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
