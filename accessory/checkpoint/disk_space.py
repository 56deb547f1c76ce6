"""Disk space: checked before a checkpoint is written, and named in the error of a write that fails."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

from accessory.errors import CheckpointError, DiskFullError
from accessory.parallel.parameters import NamedParameters

_BESIDE = 16 << 20  # bytes for tokenizer, settings and random generators: more than these take


def checkpoint_bytes(saved: NamedParameters, mp_size: int, moments: int) -> int:
    """Bytes of a checkpoint with the `saved` weights, of which this rank has slices, and `moments` bytes of moments."""
    slices = {name: mp_size if saved.slicings[name].dim is not None else 1 for name in saved}
    return sum(slices[name] * p.numel() * p.element_size() for name, p in saved.items()) + moments + _BESIDE


_KEEP_FEWER = "give --output_dir on another disk, or keep fewer checkpoints (--keep_last)"


def check_disk_space(
    output_dir: Path, needed: int, what: str = "a checkpoint needs", remedy: str = _KEEP_FEWER
) -> None:
    """Raise `DiskFullError` where fewer than `needed` bytes are free, `CheckpointError` where the disk is gone.

    what, remedy: needs them, and what to do instead of making room, for the message.
    """
    try:
        free = shutil.disk_usage(output_dir).free
    except OSError as error:
        raise CheckpointError(f"{output_dir}: cannot be looked at ({error.strerror}).") from error
    if free < needed:
        raise DiskFullError(
            f"{output_dir}: the disk is full: {what} {needed:,} bytes, {free:,} are free. Free some, {remedy}."
        )


def disk_fault(target: Path, error: Exception) -> CheckpointError:
    """What to raise after `error` kept `target` from being written: `DiskFullError` if the disk is full."""
    try:
        free = shutil.disk_usage(target.parent).free
    except OSError:
        free = 0
    # safetensors gives the number of the system's error only in its message.
    numbers = {getattr(error, "errno", None), *map(int, re.findall(r"os error (\d+)", str(error)))}
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return DiskFullError(
            f"{target}: the disk is full, or a limit on it is reached ({error}); {free:,} bytes are free. What was "
            "saved before is whole. Free some, and go on with --resume latest."
        )
    return CheckpointError(f"{target}: cannot be written ({error}); {free:,} bytes are free there.")
