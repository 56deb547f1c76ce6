"""Directories that look saved, and what may happen to them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from accessory.checkpoint.manifest import MANIFEST_FILE, manifest_of

FILES = {"trainable.safetensors": os.urandom(3000), "training_state.json": b"{}", "run.json": b'{"a": 1}'}


def checkpoint(path: Path, step: int = 7, loss: float | None = None) -> Path:
    """A directory with a manifest."""
    path.mkdir(parents=True)
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    (path / MANIFEST_FILE).write_text(json.dumps(manifest_of(path, step, loss)))
    return path


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    """Leave nine tenths."""
    os.truncate(path, path.stat().st_size * 9 // 10)
