"""The checkpoints in a run's output directory: the one that `--resume latest` goes on from, and those that stay."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from accessory.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify
from accessory.checkpoint.save import STATE_STEM
from accessory.errors import CheckpointError

FEWEST = 2
"""Smallest `--keep_last`: if one checkpoint turns out to be damaged, another one is left."""


def latest_checkpoint(output_dir: Path) -> tuple[Path, list[str]]:
    """(the newest checkpoint in `output_dir` that is whole, what is wrong with newer ones).

    Raises `CheckpointError` where there is none: a run never begins anew because what it had is damaged.
    """
    faults: list[str] = []
    steps: list[tuple[int, Path]] = []
    for path in checkpoints_in(output_dir):
        try:
            steps.append((read_manifest(path)["step"], path))
        except CheckpointError as error:
            faults.append(str(error))
    for _, path in sorted(steps, reverse=True):
        try:
            verify(path)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        return path, faults
    if not faults:
        raise CheckpointError(
            f"--resume latest: {output_dir} holds no checkpoint. Leave --resume out to begin a run there."
        )
    raise CheckpointError(
        f"--resume latest: no checkpoint in {output_dir} is whole.\n" + "\n".join(faults) + "\nMend one, or give "
        "another --output_dir to begin anew."
    )


def checkpoints_in(output_dir: Path) -> list[Path]:
    """What was saved there to be resumed from, whole or damaged, by name. Hidden ones are still being written."""
    names = (MANIFEST_FILE, f"{STATE_STEM}.json", f"{STATE_STEM}.safetensors")
    named = (path for path in sorted(output_dir.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return [path for path in named if any((path / name).exists() for name in names)]


class Retention:
    """Keeps the last `keep_last` whole checkpoints in `output_dir`, and the one with the lowest loss."""

    def __init__(self, output_dir: Path, keep_last: int) -> None:
        self.output_dir, self.keep_last = output_dir, keep_last
        self._verified: dict[Path, int] = {}  # checkpoint -> mtime of the manifest with which it agreed

    def prune(self) -> list[str]:
        """Remove older ones; returns what could not be removed, and why.

        Damaged ones do not count and stay, for whoever wants to look.
        """
        whole: list[tuple[int, float, Path]] = []
        for path in checkpoints_in(self.output_dir):
            try:
                manifest = read_manifest(path)
                written = (path / MANIFEST_FILE).stat().st_mtime_ns
                if self._verified.get(path) != written:
                    verify(path)
                    self._verified[path] = written
            except CheckpointError:
                continue
            loss = manifest.get("loss")
            whole.append((manifest["step"], math.inf if loss is None else loss, path))
        whole.sort()
        best = min(whole, key=lambda entry: (entry[1], -entry[0]), default=None)
        return [fault for entry in whole[: -self.keep_last] if entry != best and (fault := remove(entry[2]))]


def remove(checkpoint: Path) -> str | None:
    """Rename a checkpoint, so that none is ever there in part, and delete it. Returns why it could not be removed."""
    renamed = checkpoint.with_name(f".{checkpoint.name}.removed")
    try:
        shutil.rmtree(renamed, ignore_errors=True)
        checkpoint.rename(renamed)
        shutil.rmtree(renamed)
    except OSError as error:
        return f"{checkpoint}: could not be removed ({error.strerror})"
    return None
