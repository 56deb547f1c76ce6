"""`run.json`: all that a later command needs to use a saved trained part without further flags."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import Source, read_json
from accessory.checkpoint.vision_part import (
    VISION_FORMAT,
    VISION_TYPES,
    encoder_in,
    is_vision_type,
    set_encoder,
    without_vision,
)
from accessory.errors import CheckpointError, is_there

RUN_FILE = "run.json"


def run_record(
    arguments: dict[str, Any],
    base: list[Source],
    quantization: str | None,
    data: str,
    prompt_layouts: Mapping[str, int] | None = None,
    began: datetime | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """The contents of `run.json`.

    data: the fingerprint of the training data. prompt_layouts: layout of a question -> number of documents, most first.
    began: local time at which the run began; absent: now. system: the system's words before most conversations.
    """
    return {
        "arguments": arguments,
        "base": [
            {"path": str(source.path.resolve()), "format": source.format, "fingerprint": source.fingerprint()}
            for source in base
        ],
        "quantization": quantization,
        "data_fingerprint": data,
        "prompt_layouts": dict(prompt_layouts or {}),
        "system": system,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "bitsandbytes", "safetensors")},
        "started": (began or datetime.now()).astimezone().isoformat(timespec="seconds"),
    }


def began_at(resumed: Source) -> datetime:
    """Local time at which the run that saved a checkpoint began, as run.json states it. Raises `CheckpointError`."""
    started = (resumed.run or {}).get("started")
    try:
        return datetime.fromisoformat(started).replace(tzinfo=None)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{resumed.path / RUN_FILE}: 'started' is {started!r}; expected an ISO time.") from error


def with_base(paths: list[str | Path], vision_path: str | Path | None = None, no_visual: bool = False) -> list[Source]:
    """Open `paths`; where they hold only a trained part, put the base it was trained on in front, from its run.json.

    vision_path: a directory of an image encoder, in the place of that which the run had; no_visual: leave out any.
    Raises `CheckpointError` if the base is unknown, gone, or no longer the one the part was trained on, or if one of
    `paths` would replace a part before it that it was not trained on.
    """
    sources = _with_base(paths)
    if no_visual:
        return without_vision(sources)
    if vision_path:
        return set_encoder(sources, _encoder(Path(vision_path)))
    return _with_recorded_encoder(sources)


def _with_base(paths: list[str | Path]) -> list[Source]:
    sources: list[Source] = []
    for path in paths:
        sources.append(open_source(path, sources[0] if sources else None))
    _check_order(sources)
    first = sources[0]
    if first.is_vision:
        raise CheckpointError(
            f"{first.path}: holds an image encoder alone; give it with --vision_path, and the model with "
            "--pretrained_path."
        )
    if not first.is_delta:
        return sources
    if first.base:
        return [open_source(first.base), *sources]
    if not first.run:
        raise CheckpointError(
            f"{first.path}: holds only a trained part and no {RUN_FILE} that names its base; "
            "give the base first: --pretrained_path BASE TRAINABLE."
        )
    recorded: list[Source] = []
    for entry in (entry for entry in first.run["base"] if entry["format"] != VISION_FORMAT):
        recorded.append(_recorded_base(first.path, entry, recorded[0] if recorded else None))
    return recorded + sources


def _encoder(path: Path) -> Source:
    config = path / "config.json"
    if config.is_file() and not is_vision_type(kind := read_json(config).get("model_type", VISION_TYPES[0])):
        raise CheckpointError(
            f"--vision_path {path}: its model_type is {kind!r}; expected a Hugging Face directory of BLIP-2 or CLIP "
            f"({', '.join(VISION_TYPES)})."
        )
    source = open_source(path)
    if not source.is_vision:
        raise CheckpointError(
            f"--vision_path {path}: found {source.format}; expected a Hugging Face directory of BLIP-2 or CLIP."
        )
    return source


def _with_recorded_encoder(sources: list[Source]) -> list[Source]:
    """`sources`, with the image encoder that the last part was trained beside where none of them holds one."""
    part = next((source for source in reversed(sources) if source.run), None)
    if part is None or any(map(encoder_in, sources)):
        return sources
    recorded = next((entry for entry in part.run["base"] if entry["format"] == VISION_FORMAT), None)
    return set_encoder(sources, _recorded_base(part.path, recorded, None)) if recorded else sources


def beside(base: list[Source], paths: list[Path], encoder: Source | None = None) -> list[Source]:
    """Open trained parts for the `base` that is open already -> base and parts; those they went on from come first.

    encoder: a directory of an image encoder that is open, too, taken where the parts were trained with it, or do not
    say with what. Raises `CheckpointError` for what is no trained part, or was trained on another base, as its run.json
    says.
    """
    parts = [open_source(path, base[0]) for path in paths]
    first, whole = parts[0], " + ".join(str(source.path) for source in base)
    if not (first.is_delta or first.is_difference):
        raise CheckpointError(f"{first.path}: is a whole model, no part trained beside {whole}, which is loaded.")
    recorded = (first.run or {}).get("base", [])
    for source, entry in zip(base, recorded, strict=False):
        if source.fingerprint() != entry["fingerprint"]:
            raise CheckpointError(
                f"{first.path}: was trained on {entry['path']} with fingerprint {entry['fingerprint'][:12]}; loaded is "
                f"{source.path} with {source.fingerprint()[:12]}. Load the part with its own base."
            )
    if not recorded:
        return set_encoder([*base, *parts], encoder) if encoder else [*base, *parts]
    opened = {encoder.fingerprint(): encoder} if encoder else {}
    rest = (opened.get(entry["fingerprint"]) or _recorded_base(first.path, entry, base[0])
            for entry in recorded[len(base) :])  # fmt: skip
    sources = [*base, *rest, *parts]
    _check_order(sources)
    return sources


def _check_order(sources: list[Source]) -> None:
    """Raise `CheckpointError` where one would replace a trained part before it that it was not trained on."""
    for before, behind in itertools.pairwise(sources):
        if before.is_delta and not (behind.is_delta or behind.is_difference):
            raise CheckpointError(
                f"{behind.path}: is a whole model and would replace the trained part {before.path} in front of it; "
                "give the base first: --pretrained_path BASE TRAINABLE."
            )
        if before.is_delta and not behind.is_difference and _replaces(behind, before):
            raise CheckpointError(
                f"{behind.path}: would replace every value of the part {before.path}, on which it was not trained. "
                f"Parts replace one another, they do not add up: leave {before.path} out, or merge it into the "
                "base first (tools/merge.py)."
            )


def trained_prompt_layouts(sources: list[Source]) -> tuple[str, ...]:
    """The layouts of the questions that the last part was trained on, the one with most documents first.

    Empty where no file names them: for a base, or a part saved by an earlier version.
    """
    return next((source.prompt_layouts for source in reversed(sources) if source.run or source.prompt_layouts), ())


def trained_system(sources: list[Source]) -> str | None:
    """The system's words before most conversations that the last part was trained on; None: those of the layout."""
    return next((source.system for source in reversed(sources) if source.run or source.prompt_layouts), None)


def trained_tokens(sources: list[Source]) -> list[str]:
    """The tokens that runs added to the vocabulary, in their order."""
    added = [source.run.get("arguments", {}).get("new_tokens") or [] for source in sources if source.run]
    return list(dict.fromkeys(token for tokens in added for token in tokens))


def _replaces(part: Source, before: Source) -> bool:
    """Whether a trained part has all the values that the one before it has, and does not say it went on from them."""
    recorded = [entry["fingerprint"] for entry in (part.run or {}).get("base", ())]
    return before.tensors.keys() <= part.tensors.keys() and before.fingerprint() not in recorded


def _recorded_base(delta: Path, entry: dict[str, str], base: Source | None) -> Source:
    if not is_there(Path(entry["path"])):
        raise CheckpointError(
            f"{delta}: was trained on the base {entry['path']}, which is not there. "
            f"Bring it back, or give its new place: {_flag(entry)}."
        )
    source = open_source(entry["path"], base)
    if source.fingerprint() != entry["fingerprint"]:
        raise CheckpointError(
            f"{delta}: was trained on {entry['path']} with fingerprint {entry['fingerprint'][:12]}, but what lies "
            f"there now has {source.fingerprint()[:12]}. To use it all the same: {_flag(entry)}."
        )
    return source


def _flag(entry: dict[str, str]) -> str:
    return "--vision_path DIR" if entry["format"] == VISION_FORMAT else "--pretrained_path BASE TRAINABLE"
