"""Which checkpoints of a run stay: the last few that are whole, and the best."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from accessory.checkpoint.latest import checkpoints_in
from accessory.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify
from accessory.errors import CheckpointError

FEWEST = 2
"""Smallest `--keep_last`: if one checkpoint turns out to be damaged, another one is left."""


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
                self._verify_once(path)
            except CheckpointError:
                continue
            loss = manifest.get("loss")
            whole.append((manifest["step"], math.inf if loss is None else loss, path))
        whole.sort()
        best = min(whole, key=lambda entry: (entry[1], -entry[0]), default=None)
        return [fault for entry in whole[: -self.keep_last] if entry != best and (fault := remove(entry[2]))]

    def _verify_once(self, path: Path) -> None:
        written = (path / MANIFEST_FILE).stat().st_mtime_ns
        if self._verified.get(path) != written:
            verify(path)
            self._verified[path] = written


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
