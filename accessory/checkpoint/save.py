"""Writes checkpoint directories that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from accessory.errors import CheckpointError
from accessory.parallel.data import whole
from accessory.parallel.tensor import Slicing, gather_slices

SHARD_BYTES = 4 << 30  # host memory that writing a large model may take


def gather_whole(tensors: dict[str, Tensor], slicings: dict[str, Slicing]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor put together from all ranks' parts, on the CPU, one at a time. A collective: all ranks iterate."""
    for name in sorted(tensors):
        yield name, gather_slices(whole(tensors[name].detach()), slicings[name].dim).cpu()


@contextmanager
def fresh_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, renamed to `target` (replacing it) once everything is on disk, removed on failure."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _sync_tree(partial)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
        raise CheckpointError(f"{target}: cannot be written ({error.strerror or error}); {free:,} bytes are free.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_tensors(directory: Path, stem: str, tensors: Iterable[tuple[str, Tensor]], total: int) -> None:
    """Write safetensors files of at most `SHARD_BYTES` each: `stem.safetensors`, or numbered ones.

    `total` is the bytes of all tensors, needed to number the files before the last is known.
    """
    pending: dict[str, Tensor] = {}
    held = written = 0
    # A tensor that does not fit in what is left starts a new file, so there are at most twice as many as full ones.
    numbered = total > SHARD_BYTES
    for name, tensor in tensors:
        if numbered and pending and held + tensor.nbytes > SHARD_BYTES:
            save_file(pending, directory / f"{stem}-{written:05d}.safetensors")
            pending, held, written = {}, 0, written + 1
        pending[name] = tensor.contiguous()
        held += tensor.nbytes
    save_file(pending, directory / (f"{stem}-{written:05d}.safetensors" if numbered else f"{stem}.safetensors"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync_tree(directory: Path) -> None:
    for path in directory.iterdir():
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
