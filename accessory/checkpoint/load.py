"""Fills a decoder made on the meta device: tensor by tensor, this rank's slice, quantized where it will live.

The full-precision model is never whole anywhere: a slice is read, packed or cast, and dropped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from accessory.checkpoint.lazy import LazyTensor, PackedTensor, grown_rows, summed
from accessory.checkpoint.naming import in_rotary_layout
from accessory.checkpoint.source import Source
from accessory.errors import CheckpointError, nearest
from accessory.method import Attachment
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import Slicing, own_slice, pad_slice, padded_bounds, slicing_of
from accessory.quant import PackedWeight
from accessory.vision import VISIONS

_NO_WEIGHTS = re.compile(r"[IUC]\d+|BOOL|u?int\d+|bool|complex\d+")
"""Names of types, as files write them, that no weight has."""
_SHOWN = 8  # names listed per fault
VOCABULARY_MATRICES = ("tok_embeddings.weight", "output.weight")


@dataclass(frozen=True)
class Target:
    """Something in the decoder to fill: a parameter, a packed matrix in its place, or a trained part of such a matrix.

    Packing the matrix fills a trained part first; then the checkpoint of a run that trained it does, if one is given.
    """

    name: str
    owner: nn.Module
    leaf: str
    slicing: Slicing
    local_shape: tuple[int, ...]

    def whole_shape(self, ranks: int) -> tuple[int, ...]:
        """Shape before slicing over `ranks`."""
        return self.slicing.whole_shape(self.local_shape, ranks)

    @property
    def holds_integers(self) -> bool:
        """Whether it is a part of a packed matrix that is no float."""
        return isinstance(self.owner, PackedWeight) and not getattr(self.owner, self.leaf).is_floating_point()


def targets(module: nn.Module, prefix: str = "") -> Iterator[Target]:
    """Every place under `module` that a checkpoint must fill, by its name in a checkpoint."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, PackedWeight):
            continue
        for leaf, value in [*child._parameters.items(), *child._modules.items()]:
            if isinstance(value, PackedWeight):
                matrix = f"{name}.{leaf}".lstrip(".")
                yield Target(matrix, child, leaf, value.slicing, tuple(value.shape))
                for part in (name for name in value.PARTS if name in (*value.trained, *value.moved)):
                    shape = tuple(getattr(value, part).shape)
                    yield Target(f"{matrix}.{part}", value, part, value.slicing, shape)
            elif isinstance(value, nn.Parameter):
                yield Target(f"{name}.{leaf}".lstrip("."), child, leaf, slicing_of(value), tuple(value.shape))


def overlay(sources: list[Source], args: ModelArgs) -> tuple[dict[str, LazyTensor], dict[str, Source]]:
    """(tensors by our names, which source each came from): the last source that has one, in `args`' rotary layout.

    Differences are added to what lies below them; an embedding of fewer rows than the vocabulary grows.
    Raises `CheckpointError` for a difference to nothing.
    """
    found: dict[str, LazyTensor] = {}
    origin: dict[str, Source] = {}
    for source in sources:
        tensors = in_rotary_layout(source.tensors, args, source.rotary_layout, args.rotary_layout)
        if source.is_difference:
            if absent := [name for name in tensors if name not in found]:
                raise CheckpointError(
                    f"{source.path}: adds to {_list(absent, 'which is', 'which are')} in no checkpoint before it."
                )
            tensors = {name: summed(found[name], tensor) for name, tensor in tensors.items()}
        found |= tensors
        origin |= dict.fromkeys(tensors, source)
    rows = {name: found[name].shape[:1] for name in VOCABULARY_MATRICES if name in found}
    # If embedding and head differ in rows, the vocabulary has not grown: a shape is wrong, and `resolve` says so.
    if len(set(rows.values())) == 1 and next(iter(rows.values())) < (args.vocab_size,):
        found |= {name: grown_rows(found[name], args.vocab_size) for name in rows}
    return found, origin


def resolve(
    decoder: Decoder, sources: list[Source], attachment: Attachment, *, initialize: bool
) -> dict[str, LazyTensor]:
    """Which tensor fills which parameter: the last source that has it.

    Raises `CheckpointError` listing every parameter no source fills, every tensor that has no place, and every shape
    that does not fit. With `initialize`, parameters the method added may be absent, to be started afresh.
    """
    wanted = {target.name: target for target in targets(decoder)}
    faults: list[str] = []
    for source in sources:
        alien = [name for name in source.tensors if name not in wanted]
        if alien:
            faults.append(f"{source.path}: {_list(alien, 'has', 'have')} no place in this model.{_hint(alien, wanted)}")
    found, origin = overlay(sources, decoder.args)
    optional = {name for name, target in wanted.items() if isinstance(target.owner, PackedWeight)}
    optional |= attachment.initial.keys() if initialize else attachment.initial.keys() - attachment.trainable
    missing = [name for name in wanted if name not in found and name not in optional]
    if missing:
        where = " + ".join(str(source.path) for source in sources)
        faults.append(
            f"{where}: {_list(missing, 'is', 'are')} missing.{_settings_hint(missing) or _vision_hint(missing)}"
        )
    for name, target in wanted.items():
        expected = target.whole_shape(decoder.ranks)
        if name in found and found[name].shape != expected:
            faults.append(_misfit(origin[name], name, found[name].shape, expected))
        elif name in found and _NO_WEIGHTS.fullmatch(found[name].dtype) and not target.holds_integers:
            faults.append(f"{origin[name].path}: {name} holds {found[name].dtype}; expected floating-point weights.")
    if faults:
        raise CheckpointError("The checkpoint does not fit the model.\n" + "\n".join(faults[: 3 * _SHOWN]))
    return {name: tensor for name, tensor in found.items() if name in wanted}


def fill(
    decoder: Decoder,
    tensors: dict[str, LazyTensor],
    attachment: Attachment,
    layout: Layout,
    data_parallel: DataParallel,
    seed: int = 0,
    share: bool = False,
    there: Set[str] = frozenset(),
) -> None:
    """Read every parameter into place on `layout.device`, sharding each block as soon as it is full.

    share: what lies there already, in the type it is used in, is used where it lies. Without it all is copied, because
    the file behind a memory-mapped tensor may go away. there: names of what is in place.
    """
    decoder.place(layout.device)
    everything = [target for target in targets(decoder) if target.name not in there]
    inside: set[str] = set()
    silent = None if layout.is_main else True
    bar = tqdm(total=len(everything), desc="loading", unit="tensor", disable=silent, leave=False)
    for name, block in decoder.blocks():
        for target in (target for target in targets(block, name) if target.name not in there):
            _fill_one(target, tensors, attachment, layout, seed, share)
            inside.add(target.name)
            bar.update()
        data_parallel.shard_block(block)
    for target in (target for target in everything if target.name not in inside):
        _fill_one(target, tensors, attachment, layout, seed, share)
        bar.update()
    bar.close()


def fill_module(
    module: nn.Module,
    prefix: str,
    tensors: dict[str, LazyTensor],
    layout: Layout,
    there: Set[str] = frozenset(),
    share: bool = False,
) -> None:
    """Read what is under `module`, called `prefix` in a checkpoint, into place, frozen; but not what is in `there`.

    share: as of `fill`.
    """
    for target in targets(module, prefix):
        if target.name not in there:
            _fill_one(target, tensors, Attachment(), layout, 0, share)


def _fill_one(
    target: Target, tensors: dict[str, LazyTensor], attachment: Attachment, layout: Layout, seed: int, share: bool
) -> None:
    place, span = getattr(target.owner, target.leaf), _span(target, layout)
    tensor = tensors.get(target.name)
    if isinstance(place, PackedWeight) and isinstance(tensor, PackedTensor):
        state = tensor.read_packed(*span)
        place.adopt({name: part.to(layout.device, copy=not share) for name, part in state.items()})
        return
    if tensor is None and isinstance(target.owner, PackedWeight):
        value = place.detach()
    elif tensor is None:
        value = attachment.initial[target.name](named_generator(seed, target.name))
        if value.shape != (whole := target.whole_shape(layout.mp_size)):
            raise AssertionError(f"{target.name} starts as {tuple(value.shape)}; its whole shape is {whole}")
        value = own_slice(value, target.slicing, layout.mp_rank, layout.mp_size)
        if isinstance(place, PackedWeight):
            place.pack(_to_pack(target, value, layout))
            return
    elif isinstance(place, PackedWeight):
        place.pack_range(lambda *span: _to_pack(target, tensor.read(*span), layout), tensor.shape[1], span)
        return
    else:
        value = tensor.read(*span)
        value = value if target.holds_integers else _floats(target, value)
        if span[0] is not None:
            value = pad_slice(value, span[0], target.local_shape[span[0]])
    value = value.to(device=layout.device, dtype=place.dtype, copy=not share).contiguous()
    parameter = nn.Parameter(value, requires_grad=target.name in attachment.trainable)
    parameter.slicing = target.slicing
    setattr(target.owner, target.leaf, parameter)


def _floats(target: Target, value: Tensor) -> Tensor:
    """`value`. Raises `CheckpointError` for other numbers."""
    if not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise CheckpointError(f"{target.name} holds {kind} numbers; expected floating-point weights.")
    return value


def _to_pack(target: Target, value: Tensor, layout: Layout) -> Tensor:
    """`value` on this rank's device, in a type that every storage packs."""
    narrow = value.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return _floats(target, value).to(layout.device, value.dtype if narrow else torch.float32)


def _span(target: Target, layout: Layout) -> tuple[int | None, int, int]:
    """(dimension, start, stop) of this rank's slice; no dimension where it holds the whole."""
    dim = target.slicing.dim
    if dim is None or layout.mp_size == 1:
        return None, 0, 0
    size = target.whole_shape(layout.mp_size)[dim]
    return dim, *padded_bounds(size, layout.mp_rank, layout.mp_size)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator that depends on `seed` and `name` alone, so that every layout starts from the same values."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _list(names: list[str], singular: str, plural: str) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more} {plural if len(names) > 1 else singular}"


def _misfit(source: Source, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> str:
    text = f"{source.path}: {name} has shape {found}, the model {expected}."
    if hint := _settings_hint([name]):
        return text + hint
    cut = [(a, b) for a, b in zip(found, expected, strict=False) if a != b]
    if source.is_sharded and len(cut) == 1 and 0 < cut[0][0] < cut[0][1]:
        text += f" Shards may be missing: found {', '.join(file.name for file in source.files)}."
    return text


def _hint(alien: list[str], wanted: dict[str, Target]) -> str:
    if hint := _settings_hint(alien):
        return hint
    if any(name.endswith((".bias", ".scale")) for name in alien):
        return " Give the --llama_type and --llama_config it was trained with (bias_tuning, scale_tuning)."
    return nearest(alien[0], wanted)


def _vision_hint(names: list[str]) -> str:
    behind = {part for kind in VISIONS.values() for part in kind.projection}
    if any(name.split(".")[0] in behind for name in names):
        return (
            " They turn what the image encoder finds into embeddings: give a checkpoint that has them, or train them, "
            'with "vision_tuning": true in a file of --llama_config.'
        )
    return ""


def _settings_hint(names: list[str]) -> str:
    if any("lora_" in name for name in names):
        return " Give the --llama_config it was trained with (lora_rank, lora_targets, lora_layers)."
    if any(name.startswith("prefix") for name in names):
        return " Give the --llama_config it was trained with (prefix_layers, prefix_len, use_prefix_new_gate)."
    return ""
