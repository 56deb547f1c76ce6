"""The directory in which a quantization keeps what it has finished, so that it can go on after it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint.save import fresh, write_json
from accessory.errors import CheckpointError

STATES = ("full", "packed")
"""Whose hidden states are kept: the model's in full precision, and those of the one that is packed so far."""
_SETTINGS, _PROGRESS = "settings.json", "progress.json"


class Folder:
    """Files of a quantization. Each appears whole or not at all. The first rank writes what all have in common.

    group: the ranks that take part. rank: this one's number, in the names of what is its own.
    """

    def __init__(self, path: Path, rank: int, group: dist.ProcessGroup) -> None:
        self.path, self.rank, self.group = path, rank, group

    def open(self, identity: Mapping[str, Any]) -> None:
        """Make it, or find it with the same `identity`, from which all that is in it follows.

        Raises `CheckpointError` saying what differs.
        """
        wanted, file = json.loads(json.dumps(identity)), self.path / _SETTINGS
        if self.rank == 0:
            self.path.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            self.write_json(_SETTINGS, wanted)
        dist.barrier(self.group)
        found = json.loads(file.read_text(encoding="utf-8"))
        differing = [f"{k} {found.get(k)!r}, now {wanted[k]!r}" for k in wanted if found.get(k) != wanted[k]]
        if differing:
            raise CheckpointError(
                f"{self.path}: holds a quantization with other {'; '.join(differing)}. Give the same flags and data to "
                "go on with it, or remove the directory."
            )

    def progress(self) -> dict[str, Any]:
        """Figures of each block that is done, and the seconds that took."""
        found = self.read_json(_PROGRESS)
        return {"blocks": [], "seconds": 0.0} if found is None else found

    def finish(self, index: int, progress: Mapping[str, Any]) -> None:
        """Record that a block is done, once every rank has its states after it; those before it are removed."""
        self.record(_PROGRESS, progress)
        for kind in STATES:
            self.states(kind, index).unlink()

    def record(self, name: str, value: Any) -> None:
        """Write a document, once every rank has written what it tells of; no rank goes on before it is there."""
        dist.barrier(self.group)
        self.write_json(name, value)
        dist.barrier(self.group)

    def states(self, kind: str, index: int) -> Path:
        """The file of this rank's states before a block."""
        return self.path / f"{kind}-{index}-rank{self.rank}.bin"

    def write_json(self, name: str, value: Any) -> None:
        """Write a document."""
        if self.rank == 0:
            with fresh(self.path / name) as partial:
                write_json(partial, value)

    def read_json(self, name: str) -> Any:
        """A document; None where there is none."""
        file = self.path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors by name."""
        if self.rank == 0:
            with fresh(self.path / name) as partial:
                save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, partial)

    def read_tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors by name, once all ranks have come here."""
        dist.barrier(self.group)
        return load_file(self.path / name)

    def discard(self) -> None:
        """Remove it, once its result is kept elsewhere."""
        dist.barrier(self.group)
        if self.rank == 0:
            shutil.rmtree(self.path)
