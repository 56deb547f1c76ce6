"""`manifest.json`: the files of a checkpoint with size and SHA-256, so that damage is noticed.

It is written last, before the directory gets its name: a directory with a manifest that agrees was saved whole.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from accessory.checkpoint.source import read_json
from accessory.errors import CheckpointError, is_file

MANIFEST_FILE = "manifest.json"
FORMAT = 1


def manifest_of(directory: Path, step: int, loss: float | None) -> dict[str, Any]:
    """The manifest of everything in `directory`, which holds the state after `step` optimizer steps.

    `loss` is the mean of the steps since the checkpoint before; None where it is not finite, or there were none.
    """
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(directory.iterdir())
        if path.name != MANIFEST_FILE
    }
    return {"format": FORMAT, "step": step, "loss": loss, "files": files}


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises `CheckpointError` where there is none, or none of ours."""
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: has no {MANIFEST_FILE}: it was not saved whole, or not by this version of Accessory."
        )
    manifest = read_json(path)
    files, step, loss = manifest.get("files"), manifest.get("step"), manifest.get("loss")
    if manifest.get("format") != FORMAT or not isinstance(files, dict) or type(step) is not int:
        raise CheckpointError(f"{path}: is no manifest of format {FORMAT}; expected 'format', 'step' and 'files'.")
    if loss is not None and type(loss) is not float:
        raise CheckpointError(f"{path}: says {loss!r} of its loss; expected a number.")
    for name, entry in files.items():
        known = isinstance(entry, dict) and (type(entry.get("bytes")), type(entry.get("sha256"))) == (int, str)
        if not known:
            raise CheckpointError(f"{path}: says {entry!r:.80} of {name!r}; expected its bytes and sha256.")
        if Path(name).name != name or name in ("", ".", ".."):
            raise CheckpointError(f"{path}: lists {name!r}; expected names of files beside it.")
    return manifest


def verify(directory: Path) -> int:
    """Compare every file with the manifest; returns the step the checkpoint was saved after.

    Raises `CheckpointError` that names all files which are missing, of another size, or changed.
    """
    manifest = read_manifest(directory)
    faults = [fault for name, entry in manifest["files"].items() if (fault := _fault(directory / name, entry))]
    if faults:
        raise CheckpointError(f"{directory}: is damaged: {'; '.join(faults)}.")
    return manifest["step"]


def _fault(path: Path, entry: dict[str, Any]) -> str | None:
    if not is_file(path):
        return f"{path.name} is missing"
    if (size := path.stat().st_size) != entry["bytes"]:
        return f"{path.name} has {size:,} bytes, was saved with {entry['bytes']:,}"
    if _digest(path) != entry["sha256"]:
        return f"{path.name} has other contents than were saved (SHA-256)"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
