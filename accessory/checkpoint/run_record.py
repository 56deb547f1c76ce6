"""`run.json`: everything a later command needs to use a saved trained part without being told again."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any

from accessory.checkpoint.source import Source, open_source
from accessory.errors import CheckpointError

RUN_FILE = "run.json"


def run_record(arguments: dict[str, Any], base: list[Source], quantization: str | None, data: str) -> dict[str, Any]:
    """The contents of `run.json`. `data` is the fingerprint of the training data."""
    return {
        "arguments": arguments,
        "base": [
            {"path": str(source.path.resolve()), "format": source.format, "fingerprint": source.fingerprint()}
            for source in base
        ],
        "quantization": quantization,
        "data_fingerprint": data,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "bitsandbytes", "safetensors")},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def with_base(paths: list[str | Path]) -> list[Source]:
    """Open `paths`; where they hold only a trained part, put the base it was trained on in front, from its run.json.

    Raises `CheckpointError` if the base is unknown, gone, or no longer the one the part was trained on.
    """
    sources = [open_source(path) for path in paths]
    first = sources[0]
    if not first.is_delta:
        return sources
    if not first.run:
        raise CheckpointError(
            f"{first.path}: holds only a trained part and no {RUN_FILE} that names its base; "
            "give the base first: --pretrained_path BASE TRAINABLE."
        )
    return [_recorded_base(first.path, entry) for entry in first.run["base"]] + sources


def _recorded_base(delta: Path, entry: dict[str, str]) -> Source:
    if not Path(entry["path"]).exists():
        raise CheckpointError(
            f"{delta}: was trained on the base {entry['path']}, which is not there. "
            "Bring it back, or give its new place: --pretrained_path BASE TRAINABLE."
        )
    source = open_source(entry["path"])
    if source.fingerprint() != entry["fingerprint"]:
        raise CheckpointError(
            f"{delta}: was trained on {entry['path']} with fingerprint {entry['fingerprint'][:12]}, but what lies "
            f"there now has {source.fingerprint()[:12]}. To use it all the same: --pretrained_path BASE TRAINABLE."
        )
    return source
