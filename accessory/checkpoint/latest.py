"""Which of a run's checkpoints `--resume latest` goes on from: the newest that is whole."""

from __future__ import annotations

from pathlib import Path

from accessory.checkpoint.manifest import MANIFEST_FILE, read_manifest, verify
from accessory.checkpoint.save import STATE_STEM
from accessory.errors import CheckpointError


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
    """What was saved there to be resumed from, whole or damaged, by name."""
    return [path for path in sorted(output_dir.iterdir()) if _is_checkpoint(path)]


def _is_checkpoint(path: Path) -> bool:
    """Whether it was meant to be resumed from; what is still being written has a hidden name."""
    names = (MANIFEST_FILE, f"{STATE_STEM}.json", f"{STATE_STEM}.safetensors")
    return path.is_dir() and not path.name.startswith(".") and any((path / name).exists() for name in names)
