"""Whether the disk has room for a checkpoint, asked before it is needed."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import nn

from accessory.errors import DiskFullError
from accessory.parallel.tensor import Slicing

_BESIDE = 16 << 20  # tokenizer, settings, generators: more than any has


def checkpoint_bytes(saved: dict[str, nn.Parameter], slicings: dict[str, Slicing], mp_size: int, moments: int) -> int:
    """Bytes of a checkpoint with the `saved` weights, of which this rank has slices, and `moments` bytes of moments."""
    slices = {name: mp_size if slicings[name].dim is not None else 1 for name in saved}
    return sum(slices[name] * p.numel() * p.element_size() for name, p in saved.items()) + moments + _BESIDE


def check_room(output_dir: Path, needed: int) -> None:
    """Raise `DiskFullError` where fewer than `needed` bytes are free."""
    free = shutil.disk_usage(output_dir).free
    if free < needed:
        raise DiskFullError(
            f"{output_dir}: the disk is full: a checkpoint needs {needed:,} bytes, {free:,} are free. Free some, give "
            "--output_dir on another disk, or keep fewer checkpoints (--keep_last)."
        )
