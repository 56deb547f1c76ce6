"""The checkpoints in a run's output directory: the one that `--resume latest` goes on from, and those that stay."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

from accessory.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify
from accessory.checkpoint.save import STATE_STEM
from accessory.errors import CheckpointError

BEST = "best"
"""The name, beside the checkpoints, of a link to the one with the lowest validation loss."""
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
    """What was saved there to be resumed from, whole or damaged, by name. Hidden ones are still being written.

    A link is none of its own.
    """
    names = (MANIFEST_FILE, f"{STATE_STEM}.json", f"{STATE_STEM}.safetensors")
    named = (path for path in sorted(output_dir.iterdir()) if path.is_dir() and not path.name.startswith("."))
    return [path for path in named if not path.is_symlink() and any((path / name).exists() for name in names)]


def link_best(checkpoint: Path) -> str | None:
    """Point the link `BEST` at a checkpoint beside it; it is replaced in one go. Returns why it could not be."""
    link = checkpoint.with_name(BEST)
    fresh = link.with_name(f".{BEST}.fresh")
    try:
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(checkpoint.name, target_is_directory=True)
        os.replace(fresh, link)
    except OSError as error:
        return f"{link}: cannot be linked to {checkpoint.name} ({error.strerror})"
    return None


class Retention:
    """Keeps the last `keep_last` whole checkpoints in `output_dir`, and the best one.

    That is the one with the lowest validation loss, or where nothing is evaluated with the lowest loss in training.
    """

    def __init__(self, output_dir: Path, keep_last: int) -> None:
        self.output_dir, self.keep_last = output_dir, keep_last
        self._verified: dict[Path, int] = {}  # checkpoint -> mtime of the manifest with which it agreed

    def prune(self, best: str | None = None) -> list[str]:
        """Remove older ones; returns what could not be removed, and why.

        best: the name of the one with the lowest validation loss, which stays. None: that with the lowest loss does.
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
        if best is None and whole:
            best = min(whole, key=lambda entry: (entry[1], -entry[0]))[2].name
        older = [path for *_, path in whole[: -self.keep_last]]
        return [fault for path in older if path.name != best and (fault := remove(path))]


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
