"""Writes checkpoint directories that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from accessory.checkpoint.disk_space import disk_fault
from accessory.checkpoint.manifest import MANIFEST_FILE, manifest_of
from accessory.errors import CheckpointError
from accessory.parallel.agree import together
from accessory.tokenizer import Tokenizer

STATE_STEM = "training_state"
SHARD_BYTES = 4 << 30  # host memory that writing a large model may take


@contextmanager
def fresh(target: Path) -> Iterator[Path]:
    """A path to write a file or a directory of files to; it becomes `target` once all is on disk, or is removed.

    What lies at `target` is replaced. Raises `CheckpointError` for what cannot be written.
    """
    partial = target.with_name(f".{target.name}.partial")
    try:
        _remove(partial)
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _sync_tree(partial)
        _replace(target, partial)
        _sync(target.parent)
    except (OSError, SafetensorError) as error:
        raise disk_fault(target, error) from error
    finally:
        _remove(partial)


@contextmanager
def fresh_directory(target: Path) -> Iterator[Path]:
    """`fresh`, with a directory made there."""
    with fresh(target) as partial:
        partial.mkdir()
        yield partial


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _replace(target: Path, partial: Path) -> None:
    """Put `partial` in the place of `target`, which is moved aside first: its removal may fail or be cut short."""
    if not target.exists():
        partial.rename(target)
        return
    former = target.with_name(f".{target.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    target.rename(former)
    try:
        partial.rename(target)
    except OSError:
        former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)


def in_shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Name -> tensor of one file after the other, each of about `SHARD_BYTES`; emptied when the next is asked for."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard.clear()
            held = 0
        shard[name] = tensor.contiguous()
        held += tensor.nbytes
    yield shard


def write_tensors(directory: Path, stem: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write `stem.safetensors`, preceded by `stem-NNNNN.safetensors` of about `SHARD_BYTES` each for a large model."""
    for number, shard in enumerate(in_shards(tensors)):
        file = directory / f"{stem}-{number:05d}.safetensors"
        save_file(shard, file)
    file.rename(directory / f"{stem}.safetensors")


@dataclass
class CheckpointWriter:
    """Writes `output_dir/NAME/`: weights, training state, JSON `documents` by file name, tokenizer and manifest."""

    output_dir: Path
    stem: str
    documents: dict[str, Any]
    tokenizer: Tokenizer

    def write(
        self,
        name: str,
        weights: Iterator[tuple[str, Tensor]],
        state: dict[str, Tensor],
        state_record: dict[str, Any],
        step: int,
        loss: float | None = None,
    ) -> Path:
        """Write the state after `step` optimizer steps; `loss` is their mean since the last save.

        A collective: all ranks iterate `weights`, the main one writes; all raise `CheckpointError` if it cannot.
        """
        target, faults = self.output_dir / name, []
        if dist.get_rank() == 0:
            try:
                with fresh_directory(target) as directory:
                    write_tensors(directory, self.stem, weights)
                    save_file(state, directory / f"{STATE_STEM}.safetensors")  # one file: it is read back as one
                    for file_name, content in {f"{STATE_STEM}.json": state_record, **self.documents}.items():
                        write_json(directory / file_name, content)
                    self.tokenizer.save(directory)
                    write_json(directory / MANIFEST_FILE, manifest_of(directory, step, loss))
            except CheckpointError as error:
                faults.append(error)
            except Exception as error:  # the other ranks are waiting: whatever it was, all must hear of it
                faults.append(CheckpointError(f"{target}: cannot be written ({error!r})."))
        for _ in weights:  # the ranks that do not write, and what a failed write left over
            pass
        together(_raise_first, faults)
        return target


def _raise_first(faults: list[CheckpointError]) -> None:
    if faults:
        raise faults[0]


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync_tree(path: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for file in path.iterdir() if path.is_dir() else (path,):
        file.chmod(0o666 & ~mask)  # safetensors leaves files that only their owner can read
        _sync(file)
    _sync(path)


def _sync(path: Path) -> None:
    """Have what was written to a file or directory reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
