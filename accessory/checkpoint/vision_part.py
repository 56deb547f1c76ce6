"""The image encoder among checkpoints: a Hugging Face directory of one alone, or part of a whole model's tensors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from accessory.checkpoint.lazy import LazyTensor
from accessory.checkpoint.source import Source
from accessory.errors import CheckpointError
from accessory.vision import VISIONS, Vision, vision_of_directory

VISION_FORMAT = "Hugging Face (image encoder)"
"""The format of an opened directory that holds an encoder alone."""
UNNAMED = "clip"
"""The image encoder of models whose --llama_type names none."""


def named_with_encoder(family: str, vision: Vision | None) -> str:
    """What `--llama_type` begins with for models of `family` that have this image encoder."""
    return family if vision is None or vision.name == UNNAMED else f"{family}_{vision.name}"


VISION_TYPES = tuple(model_type for kind in VISIONS.values() for model_type in kind.model_types)
"""`model_type` of Hugging Face directories that are opened as an image encoder."""


def is_vision_type(model_type: object) -> bool:
    """Whether it is one of `VISION_TYPES`."""
    return model_type in VISION_TYPES


def vision_source(path: Path, config: Mapping[str, Any], theirs: dict[str, LazyTensor], files: list[Path]) -> Source:
    """The encoder in a Hugging Face directory, from its config.json and its tensors. Raises `CheckpointError`."""
    vision = vision_of_directory(config, str(path / "config.json"))
    tensors = vision.from_directory(theirs)
    return Source(path, VISION_FORMAT, files, tensors, is_delta=True, is_vision=True, vision=vision)


def with_vision(source: Source) -> Source:
    """`source` with what it holds of an image encoder by our names, and the architecture that its settings state.

    Raises `CheckpointError` for settings that cannot be.
    """
    held = next((kind for kind in VISIONS.values() if any(map(kind.owns, source.tensors))), None)
    stated = next((kind for kind in VISIONS.values() if kind.key in (source.settings or {})), None)
    if source.is_vision or not (held or stated):
        return source
    vision, tensors = None, source.tensors
    if held:
        rest = {name: tensor for name, tensor in tensors.items() if not held.owns(name)}
        tensors = rest | held.from_checkpoint(tensors)
    if stated:
        vision = stated.of_settings(source.settings[stated.key], str(source.path / "config.json"))
    return replace(source, tensors=tensors, vision=vision)


def encoder_in(source: Source) -> type[Vision] | None:
    """The kind of image encoder whose weights it holds; None: it holds none."""
    for kind in VISIONS.values():
        if any(name.startswith(f"{kind.encoder}.") for name in source.tensors):
            return kind
    return None


def without_vision(sources: list[Source]) -> list[Source]:
    """The same without image encoders, and without what was trained of what is behind them."""
    kinds = VISIONS.values()
    return [
        replace(source, vision=None, tensors={
            name: tensor for name, tensor in source.tensors.items() if not any(kind.owns(name) for kind in kinds)
        }) for source in sources if not source.is_vision
    ]  # fmt: skip


def vision_among(sources: list[Source], name: str, llama_type: str) -> Vision | None:
    """The image encoder that `sources` have, as the last one states that does, or as shapes tell; None: there is none.

    name: the encoder's that `--llama_type` names, or empty. Raises `CheckpointError` where that is absent, and where
    they have different ones.
    """
    stated = next((source.vision for source in reversed(sources) if source.vision), None)
    holder = next((source for source in reversed(sources) if encoder_in(source)), None)
    _check_one_kind(sources)
    if name and holder is None:
        where = " + ".join(str(source.path) for source in sources)
        raise CheckpointError(
            f"--llama_type {llama_type}: {where} holds no image encoder; give its Hugging Face directory with "
            "--vision_path."
        )
    return stated or (encoder_in(holder).of_tensors(holder.tensors, str(holder.path)) if holder else None)


def _check_one_kind(sources: list[Source]) -> None:
    """Raise `CheckpointError` where two of them have image encoders of different kinds."""
    kinds = [type(source.vision) if source.vision else encoder_in(source) for source in sources]
    seeing = [(source.path, kind) for source, kind in zip(sources, kinds, strict=True) if kind]
    for (before, kind), (behind, another) in itertools.pairwise(seeing):
        if kind is not another:
            raise CheckpointError(
                f"{before} has the image encoder {kind.name}, {behind} has {another.name}: they do not go together. "
                "Give --vision_path a directory of the kind that the model was trained with, or leave images out with "
                "--no_visual."
            )


def set_encoder(sources: list[Source], encoder: Source) -> list[Source]:
    """`sources` with `encoder` behind the base, in the place of any other directory of one."""
    rest = [source for source in sources if not source.is_vision]
    place = next((place for place, source in enumerate(rest) if source.is_delta), len(rest))
    return [*rest[:place], encoder, *rest[place:]]
