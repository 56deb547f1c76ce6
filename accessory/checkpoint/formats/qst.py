"""Directories of the published QST code, as its `save_qst_state` leaves them: a side network, read as a trained part.

Each file is one state dict of PyTorch (of the code as it was in November 2024):

- `qst_layers_parameters.pt`, a ModuleList of decoder layers with transformers' names: `0.self_attn.q_proj.weight`, ...
- `qst_z_parameters.pt`, a ParameterList of gates: `0`, `1`, ..., each [d / r];
- `qst_downsample_parameters.pt`, a ModuleList of adapters: `0.adapter_A.weight` [k, d] and `0.adapter_B.weight`
  [d / r, k], and the LayerNorms `0.pre_layer_norm` [d] and `0.post_layer_norm` [d / r] where its config asks for them;
- `qst_norm_parameters.pt`, the norm after the last layer: `weight`, and OPT's `bias`;
- `qst_upsample_parameters.pt`: `weight` [d, d / r] and `bias` [d];
- the final gate, a bare tensor [d]: `lm_head_z_path.pt` (LLaMA), `lm_head_z_parameters.pt` (OPT).

Names may begin with a module's (`model.qst_layers.0.`), as they do in a state dict of a larger model. Rotary channels
are in transformers' layout, which a side network always has here too. The sigmoid of the final gate is the share of the
base in LLaMA's code, and of the side network in OPT's: for OPT our gate is theirs negated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from accessory.checkpoint.formats.torch_shards import load_torch_file, load_torch_tensor
from accessory.checkpoint.lazy import HeldTensor, LazyTensor
from accessory.checkpoint.naming import Tensors
from accessory.checkpoint.source import Source, model_args_of, present
from accessory.errors import CheckpointError
from accessory.method.side_tuning import SideTuning
from accessory.model.args import ModelArgs
from accessory.model.families import Architecture, architecture_of

LAYERS, GATES, DOWNSAMPLES = "qst_layers_parameters.pt", "qst_z_parameters.pt", "qst_downsample_parameters.pt"
NORM, UPSAMPLE = "qst_norm_parameters.pt", "qst_upsample_parameters.pt"
STATES = (LAYERS, GATES, DOWNSAMPLES, NORM, UPSAMPLE)
FINAL_GATES = {"llama": "lm_head_z_path.pt", "opt": "lm_head_z_parameters.pt"}
"""Family -> the file of its final gate; the published code knows no other families."""
ADAPTER = {"adapter_A": "a", "adapter_B": "b", "pre_layer_norm": "norm_before", "post_layer_norm": "norm_after"}
"""Their modules of a downsample -> ours."""
_CLASSIFIER = re.compile(r"qst_score_parameters\.pt|score_z_\w+\.pt")
_NUMBERED = re.compile(r"(?:\D*\.)?(\d+)(?:\.(.+))?")
_LEAVES = ("weight", "bias")
_SHOWN = 8  # names listed per fault


def open_qst(path: Path, base: Source | None) -> Source | None:
    """Open a directory that the published code saved; None for one that holds none of its files.

    base: what it was trained beside, whose shape tells `r`; without it the directory can be described only. Raises
    `CheckpointError` for a classifier's, for files that are missing, damaged or hold other names, and for what belongs
    to another base.
    """
    held = [name for name in (*STATES, *FINAL_GATES.values()) if (path / name).is_file()]
    if not held:
        return None
    if classifier := sorted(file.name for file in path.iterdir() if _CLASSIFIER.fullmatch(file.name)):
        raise CheckpointError(f"{path}: {', '.join(classifier)} is of a classifier; only language models are read.")
    if absent := [name for name in STATES if name not in held]:
        raise CheckpointError(f"{path}: {', '.join(absent)} is missing; found {present(path)}.")
    reading = _Reading(path)
    reading.read()
    args = model_args_of(base) if base else None
    notes = () if FINAL_GATES[reading.family] in held else (
        f"holds no {FINAL_GATES[reading.family]}: its final gate is 1, as the published code leaves it on a GPU",
    )  # fmt: skip
    return Source(
        path,
        "QST",
        [path / name for name in held],
        reading.tensors,
        reading.settings(args),
        reading.family + SideTuning.suffix,
        is_delta=True,
        notes=notes,
    )


@dataclass
class _Reading:
    """One directory while it is read. family: one of `FINAL_GATES`; tensors: by our names; strange: others, by file."""

    path: Path
    family: str = ""
    tensors: Tensors = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)

    def read(self) -> None:
        """Take in every file. Raises `CheckpointError` for names that the published code does not write."""
        layers = load_torch_file(self.path / LAYERS)
        self.family = "opt" if any(".fc1." in key for key in layers) else "llama"
        architecture = architecture_of(self.family, str(self.path))
        self._take(LAYERS, layers, "side", inner_modules(architecture))
        self._take(DOWNSAMPLES, load_torch_file(self.path / DOWNSAMPLES), "downsample", ADAPTER)
        self._take(GATES, load_torch_file(self.path / GATES), "gates", {})
        for file, module in ((NORM, "side_norm"), (UPSAMPLE, "upsample")):
            for key, tensor in load_torch_file(self.path / file).items():
                leaf = key.rpartition(".")[2]
                self._add(file, key, f"{module}.{leaf}" if leaf in _LEAVES else None, tensor)
        if self.strange:
            raise CheckpointError(
                f"{self.path}: {_some(self.strange)} is nothing that the published QST code writes of a "
                f"{self.family} model."
            )
        self.tensors["final_gate.weight"] = self._final_gate()

    def _take(self, file: str, state: Mapping[str, Tensor], ours: str, modules: Mapping[str, str]) -> None:
        """Tensors by layer: `0.module.weight` of the known modules; without any, bare ones called `0`."""
        for key, tensor in state.items():
            if key.endswith("rotary_emb.inv_freq"):
                continue
            found, name = _NUMBERED.fullmatch(key), None
            if found and not modules:
                name = None if found[2] else f"{ours}.{int(found[1])}.weight"
            elif found and found[2]:
                module, _, leaf = found[2].rpartition(".")
                known = module in modules and leaf in _LEAVES
                name = f"{ours}.{int(found[1])}.{modules[module]}.{leaf}" if known else None
            self._add(file, key, name, tensor)

    def _add(self, file: str, key: str, name: str | None, tensor: Tensor) -> None:
        if name is None:
            self.strange.append(f"{key} in {file}")
        elif name in self.tensors:
            raise CheckpointError(f"{self.path / file}: holds {name} twice, once as {key}.")
        else:
            self.tensors[name] = HeldTensor(tensor)

    def _final_gate(self) -> LazyTensor:
        """The tensor as it was saved, from a parameter or not; ones where it was not saved; negated for OPT."""
        theirs, file = dict(FINAL_GATES), self.path / FINAL_GATES[self.family]
        del theirs[self.family]
        if not file.is_file() and (foreign := [name for name in theirs.values() if (self.path / name).is_file()]):
            raise CheckpointError(
                f"{self.path}: its layers are a {self.family} model's, whose final gate is {file.name}; found "
                f"{foreign[0]}."
            )
        gate = load_torch_tensor(file) if file.is_file() else torch.ones(self._shape("upsample.weight", UPSAMPLE)[0])
        return HeldTensor(-gate if self.family == "opt" else gate)

    def settings(self, args: ModelArgs | None) -> dict[str, Any]:
        """Those of the method that the shapes imply, beside a base of `args`."""
        bottleneck, wide = self._shape("downsample.0.a.weight", DOWNSAMPLES)
        narrow, _ = self._shape("downsample.0.b.weight", DOWNSAMPLES)
        return {
            "start": "released",
            "side_layers": 1,
            "tail": 0,
            "r": self._reduction(wide, narrow, args) if args else wide // narrow,
            "peft_hidden_size": bottleneck,
            "add_layer_norm_before_adapter": "downsample.0.norm_before.weight" in self.tensors,
            "add_layer_norm_after_adapter": "downsample.0.norm_after.weight" in self.tensors,
        }

    def _reduction(self, wide: int, narrow: int, args: ModelArgs) -> int:
        """The `r` that makes the side network's two widths from the base's, both rounded down."""
        mlp = self._shape("side.0.feed_forward.w1.weight", LAYERS)[0]
        layers = {int(name.split(".")[1]) for name in self.tensors if name.startswith("side.")}
        family = architecture_of(args.architecture, str(self.path)).family
        if (self.family, wide, len(layers)) != (family, args.dim, args.n_layers):
            raise CheckpointError(
                f"{self.path}: is for another base: it is of a {self.family} model with {len(layers)} blocks of "
                f"{wide} channels; the base is a {family} with {args.n_layers} blocks of {args.dim}."
            )
        candidates = range(wide // narrow, wide // (narrow + 1), -1)
        found = next((r for r in candidates if args.hidden_dim // r == mlp), None)
        if found is None:
            raise CheckpointError(
                f"{self.path}: its layers are {narrow} channels wide and their MLPs {mlp}; no r makes both of the "
                f"base's {wide} and {args.hidden_dim}. (The code of October 2023 divided the MLP's width twice.)"
            )
        return found

    def _shape(self, name: str, file: str) -> tuple[int, int]:
        """The shape of a matrix. Raises `CheckpointError` where it is missing, no matrix, or empty."""
        tensor = self.tensors.get(name)
        if tensor is None or len(tensor.shape) != 2 or 0 in tensor.shape:
            found = f"has shape {tensor.shape}" if tensor else "is missing"
            raise CheckpointError(f"{self.path / file}: what is {name} here {found}; expected a matrix.")
        return tensor.shape


def inner_modules(architecture: Architecture) -> dict[str, str]:
    """Module of a decoder layer of transformers -> ours within a block."""
    return {their: our for their, our in architecture.names.inner.items() if isinstance(our, str)}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
