"""What a resumed run needs beside the trained weights: optimizer moments, counters, random generators.

Moments are saved whole, cut like the parameters they belong to, so that a run can be resumed on another layout. Those
in 8 bits are codes, whole, and every rank's scales: exact on the same layout, unpacked for another one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.checkpoint.save import STATE_STEM
from accessory.checkpoint.source import open_safetensors, read_json
from accessory.checkpoint.validation_state import ValidationState
from accessory.errors import CheckpointError
from accessory.optim import moment_device
from accessory.parallel.agree import differences
from accessory.parallel.data import as_shard, is_sharded, local, shard_like
from accessory.parallel.groups import Layout, model_parallel_group
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import Slicing, own_slice
from accessory.quant.moments import unpack_moment, zero_code

CHANGEABLE = frozenset((
    "base", "data", "seed", "global_batch", "group_by_length", "quantization", "precision", "lr", "min_lr",
    "lr_schedule", "warmup_epochs", "epochs", "weight_decay", "adam_beta2", "clip_grad", "val_split",
    "prompt_loss_weight", "embed_dropout", "attn_dropout", "teacher",
))  # fmt: skip
"""Of a run's identity: what may differ where the user says so. Method and optimizer may not: nothing would fit."""
CHANGEABLE_IN_PRETRAINING = frozenset((
    "base", "data", "seed", "global_batch", "precision", "lr", "min_lr", "warmup_iters", "lr_decay_iters", "epochs",
    "weight_decay", "adam_beta2", "clip_grad",
))  # fmt: skip
"""The same of a pretraining run."""
_ALL_CHANGEABLE = CHANGEABLE | CHANGEABLE_IN_PRETRAINING
_UNRECORDED = {
    "lr_schedule": "cosine", "adam_beta2": 0.95, "prompt_loss_weight": 0.0, "group_by_length": False,
    "quant_targets": [], "embed_dropout": 0.0, "attn_dropout": 0.0, "teacher": None,
}  # fmt: skip
"""Of the identity: what runs of earlier versions did without recording it."""
_FOLLOWED = ("tail", "side_heads")
"""Of the identity's settings: what earlier versions recorded as null where it followed from the base."""
_UNRECORDED_SETTINGS = {"vision_tuning": False}
"""Of the identity's settings: what runs of earlier versions did without recording it."""
FIRST_LOSS_SCALE, LEAST_LOSS_SCALE = 65536.0, 1.0
"""The loss scale of an fp16 run at its start, and the smallest."""
LOSS_SCALE_GROWTH = 2000  # good steps in a row until the scale is doubled
ORDER = "order."
"""What names of tensors begin with that the order of the data remembers."""
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}
_MOMENTS = tuple(_SIGNED)


@dataclass
class Progress:
    """Where a run stands. `step` counts optimizer steps within `epoch`, `total_steps` those of the run.

    In fp16 the next step's loss is multiplied by `loss_scale`, and `good_steps` counts the finite steps in a row; other
    precisions leave both as they are. `skipped` counts the latest steps in a row that changed nothing, since their loss
    or gradient was not finite.
    """

    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    loss_scale: float = FIRST_LOSS_SCALE
    good_steps: int = 0
    skipped: int = 0

    def advance(self, steps_per_epoch: int, skipped: bool) -> None:
        """A step is over; `skipped`: it changed nothing."""
        self.skipped = self.skipped + 1 if skipped else 0
        self.step, self.total_steps = self.step + 1, self.total_steps + 1
        if self.step == steps_per_epoch:
            self.epoch, self.step = self.epoch + 1, 0

    def rescale(self, finite: bool) -> None:
        """After a step in fp16 whose gradients were `finite` or not (Micikevicius et al. 2018, section 3.2)."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.loss_scale = max(self.loss_scale / 2, LEAST_LOSS_SCALE)
        elif self.good_steps % LOSS_SCALE_GROWTH == 0:
            self.loss_scale *= 2

    @property
    def checkpoint_name(self) -> str:
        """`epochN` after N's last step (N from 0), `epochN-iterM` after M steps within it."""
        return f"epoch{self.epoch - 1}" if self.step == 0 else f"epoch{self.epoch}-iter{self.step}"


@dataclass(frozen=True)
class WorkingValues:
    """What a run changes that is no part of its checkpoint: parameters, and `counters`, fp64, equal on all ranks."""

    parameters: NamedParameters
    counters: Tensor


def collect_training_state(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, working: WorkingValues | None = None
) -> dict[str, Tensor]:
    """Moments put together from all ranks and every rank's generators, on the main rank's CPU. A collective."""
    tensors: dict[str, Tensor] = {}
    if working:
        tensors |= {f"value.{name}": value for name, value in working.parameters.gathered()}
        tensors["counters"] = working.counters.clone()
    for moment in _MOMENTS:
        for name in sorted(parameters):  # one at a time: all of them together may not fit beside the model
            if (state := optimizer.state.get(parameters[name])) is not None:
                sharded = _as_sharded(state[moment], parameters[name], parameters.slicings[name])
                ((_, tensors[f"{moment}.{name}"]),) = parameters.gathered({name: sharded})
    if counts := [optimizer.state[p]["step"] for p in parameters.values() if p in optimizer.state]:
        tensors["step"] = counts[0].detach().cpu()  # fewer than the run's steps where fp16 skipped some
    own: list[dict[str, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(own, _generators() | _scales(optimizer, parameters))
    for rank, states in enumerate(own):
        tensors |= {f"{name}.{rank}": value for name, value in states.items()}
    return tensors


def state_record(
    progress: Progress,
    identity: dict[str, Any],
    conditions: dict[str, Any],
    validation: ValidationState | None = None,
) -> dict[str, Any]:
    """The JSON beside the tensors.

    `identity` must be equal for a run to be resumed; `conditions`, `world_size` and `mp_size` among them, for it to go
    on bit for bit.
    """
    record = {"progress": asdict(progress), "identity": identity, "conditions": conditions}
    return {**record, "validation": validation.record()} if validation else record


@dataclass(frozen=True)
class Resumption:
    """Where a run resumes, and how it differs from the saved run.

    ranks, mp_size: of the saved run. changed: parts of the identity that differ, as was allowed. inexact: conditions
    that differ, with both values; the run then does not go on bit for bit. validation: what its evaluations found.
    """

    directory: Path
    progress: Progress
    ranks: int
    mp_size: int
    changed: tuple[str, ...]
    inexact: tuple[str, ...]
    validation: ValidationState | None = None

    def has_layout(self, layout: Layout) -> bool:
        """Whether ranks and slices are those of the saved run."""
        return (self.ranks, self.mp_size) == (layout.world_size, layout.mp_size)


def find_resumption(
    directory: Path,
    identity: dict[str, Any],
    conditions: dict[str, Any],
    allowed: Collection[str] = (),
    follows: Mapping[str, str] = MappingProxyType({}),
) -> Resumption:
    """Compare the run that saved `directory` with this one, without reading tensors.

    follows: key of the identity -> the key that its value follows from. Raises `CheckpointError` for a missing or
    damaged training state, and for another run's, naming each key of the identity that differs and is neither `allowed`
    to nor follows from one that is.
    """
    record, state_file = directory / f"{STATE_STEM}.json", directory / f"{STATE_STEM}.safetensors"
    if not record.is_file() or not state_file.is_file():
        raise CheckpointError(f"{directory}: holds no training state to resume from; expected {record.name} in it.")
    progress, was, conditions_were, validation = _read_record(record)
    was = _spelled_out(_UNRECORDED | was, identity)
    changed = {key: found for key, value in identity.items() if (found := differences(key, was.get(key), value))}
    if refused := [key for key in changed if key not in allowed and follows.get(key) not in allowed]:
        said = "; ".join(_said(*values) for key in refused for values in changed[key])
        enough = " ".join(key for key in changed if follows.get(key) not in changed)
        hint = f" To go on all the same: --allow_changed {enough}." if _ALL_CHANGEABLE.issuperset(refused) else ""
        raise CheckpointError(f"{directory}: belongs to another run: {said}.{hint}")
    inexact = [
        f"{key} was {conditions_were.get(key)}, is {value}"
        for key, value in conditions.items()
        if conditions_were.get(key) != value
    ]
    ranks, mp_size = conditions_were["world_size"], conditions_were["mp_size"]
    return Resumption(directory, progress, ranks, mp_size, tuple(changed), tuple(inexact), validation)


def _spelled_out(was: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """The identity `was`, with this one's settings in place of null; what was saved is compared with them elsewhere."""
    settings, now = was.get("settings"), identity.get("settings")
    if not (isinstance(settings, dict) and isinstance(now, dict)):
        return was
    settings = {key: value for key, value in _UNRECORDED_SETTINGS.items() if key in now} | settings
    absent = [key for key in _FOLLOWED if key in now and settings.get(key, 0) is None]
    return was | {"settings": settings | {key: now[key] for key in absent}}


def _said(name: str, was: Any, now: Any) -> str:
    if isinstance(now, dict):
        return f"{name} was {was!r}, recorded by an earlier version, which does not tell what in it differs now"
    return f"{name} was {was!r}, is {now!r}"


def restore_training_state(
    found: Resumption,
    optimizer: torch.optim.Optimizer,
    parameters: NamedParameters,
    layout: Layout,
    working: WorkingValues | None = None,
) -> None:
    """Restore the optimizer and, on the layout that was saved, this rank's generators. Raises `CheckpointError`."""
    tensors = _read(found.directory / f"{STATE_STEM}.safetensors", parameters, found.ranks)
    if working:
        _restore_working(found.directory, tensors, working, layout)
    count = tensors.get("step", torch.tensor(float(found.progress.total_steps)))
    for name, parameter in parameters.items():
        if f"{_MOMENTS[0]}.{name}" not in tensors:
            continue  # the optimizer has not stepped yet
        state = {"step": count.to(parameter.device, copy=True)}
        for moment in _MOMENTS:
            values, slicing = tensors[f"{moment}.{name}"], parameters.slicings[name]
            scales = {rank: tensors.get(f"{moment}_scales.{name}.{rank}") for rank in range(found.ranks)}
            if values.dtype != torch.uint8:
                state[moment] = _place(values, parameter, slicing, layout, moment_device(optimizer, parameter))
            elif found.has_layout(layout):
                state[moment] = _place_codes(values, _SIGNED[moment], parameter, slicing, layout)
                state[f"{moment}_scales"] = scales[layout.rank].to(parameter.device)
            else:
                whole = _unpacked(values, scales, _SIGNED[moment], slicing, found.mp_size)
                state[moment] = _place(whole, parameter, slicing, layout, moment_device(optimizer, parameter))
        optimizer.state[parameter] = state
    if found.has_layout(layout):
        torch.set_rng_state(tensors[f"generator.cpu.{layout.rank}"])
        if layout.device.type == "cuda" and f"generator.cuda.{layout.rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"generator.cuda.{layout.rank}"], layout.device)


def read_order_state(found: Resumption) -> dict[str, np.ndarray]:
    """What the saved run's order of the data had to remember, by name. Raises `CheckpointError`."""
    tensors = open_safetensors([found.directory / f"{STATE_STEM}.safetensors"])
    return {
        name.removeprefix(ORDER): tensor.read().numpy() for name, tensor in tensors.items() if name.startswith(ORDER)
    }


def _restore_working(directory: Path, tensors: dict[str, Tensor], working: WorkingValues, layout: Layout) -> None:
    names = {f"value.{name}": name for name in working.parameters}
    if missing := [name for name in (*names, "counters") if name not in tensors]:
        raise CheckpointError(
            f"{directory / STATE_STEM}.safetensors: {', '.join(missing[:5])} is missing; expected what the method "
            "keeps between steps."
        )
    for stored, name in names.items():
        parameter = working.parameters[name]
        placed = _place(tensors[stored], parameter, working.parameters.slicings[name], layout)
        local(parameter).data.copy_(local(placed))
    working.counters.copy_(tensors["counters"])


def _read_record(record: Path) -> tuple[Progress, dict[str, Any], dict[str, Any], ValidationState | None]:
    """Progress, identity, conditions, state of validation.

    Raises `CheckpointError` where they are not there or of other types.
    """
    saved = read_json(record)
    progress, identity, conditions = (saved.get(key) for key in ("progress", "identity", "conditions"))
    kinds = {field.name: (int, float) if field.type == "float" else (int,) for field in fields(Progress)}
    if (
        not all(isinstance(part, dict) for part in (progress, identity, conditions))
        or progress.keys() != kinds.keys()
        or not all(type(progress[name]) in kind for name, kind in kinds.items())
        or not all(type(conditions.get(name)) is int for name in ("world_size", "mp_size"))
    ):
        raise CheckpointError(f"{record}: expected the progress, identity and conditions of a run.")
    return Progress(**progress), identity, conditions, ValidationState.of(saved.get("validation"), str(record))


def _as_sharded(moment: Tensor, parameter: nn.Parameter, slicing: Slicing) -> Tensor:
    """A moment of this rank's shard as a sharded tensor, if its parameter is one.

    If ranks hold parts of it, the parts are joined on the ranks' device; a whole moment on the host stays there.
    """
    if is_sharded(moment):
        return moment
    if is_sharded(parameter):
        return as_shard(moment.to(parameter.device), parameter)
    cut = slicing.dim is not None and dist.get_world_size(model_parallel_group()) > 1
    return moment.to(parameter.device) if cut else moment


def _scales(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, Tensor]:
    """This rank's scales of 8-bit moments, which are made in blocks of its own shards."""
    return {
        f"{moment}_scales.{name}": optimizer.state[p][f"{moment}_scales"].cpu()
        for name, p in parameters.items()
        for moment in _MOMENTS
        if f"{moment}_scales" in optimizer.state.get(p, {})
    }


def _read(file: Path, parameters: NamedParameters, ranks: int) -> dict[str, Tensor]:
    tensors = {name: tensor.read() for name, tensor in open_safetensors([file]).items()}
    if missing := [f"generator.cpu.{rank}" for rank in range(ranks) if f"generator.cpu.{rank}" not in tensors]:
        raise CheckpointError(f"{file}: {', '.join(missing[:5])} is missing; expected the generators of {ranks} ranks.")
    wanted = [f"{moment}.{name}" for moment in _MOMENTS for name in parameters]
    if not any(name.startswith(_MOMENTS) for name in tensors):
        return tensors
    if missing := [name for name in wanted if name not in tensors]:
        raise CheckpointError(f"{file}: {', '.join(missing[:5])} is missing; expected the moments of what is trained.")
    packed = [name.replace(".", "_scales.", 1) for name in wanted if tensors[name].dtype == torch.uint8]
    if missing := [f"{name}.{rank}" for name in packed for rank in range(ranks) if f"{name}.{rank}" not in tensors]:
        raise CheckpointError(f"{file}: {', '.join(missing[:5])} is missing; expected the scales of 8-bit moments.")
    return tensors


def _place(
    value: Tensor, parameter: nn.Parameter, slicing: Slicing, layout: Layout, device: torch.device | None = None
) -> Tensor:
    value = own_slice(value, slicing, layout.mp_rank, layout.mp_size).contiguous()
    return shard_like(value.to(device or parameter.device), parameter)


def _place_codes(codes: Tensor, signed: bool, parameter: nn.Parameter, slicing: Slicing, layout: Layout) -> Tensor:
    """`_place` for uint8 codes; a slice is padded with the code of 0."""
    zero = zero_code(signed)
    return (_place(codes.float() - zero, parameter, slicing, layout) + zero).to(torch.uint8)


def _unpacked(codes: Tensor, scales: dict[int, Tensor], signed: bool, slicing: Slicing, mp_size: int) -> Tensor:
    """The whole fp32 moment from whole codes and the scales of all ranks, by the shards that these were made on."""
    dp_size, slices = len(scales) // mp_size, []
    for mp_rank in range(mp_size):
        mine = own_slice(codes, slicing, mp_rank, mp_size)  # what pads the last one is cut off below
        shards = [unpack_moment(shard, scales[dp_rank * mp_size + mp_rank], signed)
                  for dp_rank, shard in enumerate(mine.chunk(dp_size))]  # fmt: skip
        slices.append(torch.cat(shards))
    if slicing.dim is None:
        return slices[0]
    return torch.cat(slices, slicing.dim).narrow(slicing.dim, 0, codes.shape[slicing.dim])


def _generators() -> dict[str, Tensor]:
    states = {"generator.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["generator.cuda"] = torch.cuda.get_rng_state()
    return states
