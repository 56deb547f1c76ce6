"""How much a checkpoint takes is known before it is written, and a full disk is told from other faults."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from safetensors import SafetensorError

from accessory.checkpoint.disk_space import check_disk_space, disk_fault
from accessory.config import FinetuneConfig, parse
from accessory.errors import CheckpointError, DiskFullError
from accessory.finetuning import finetune
from accessory.run.saving import Saver
from tests.faults.job import Job


@pytest.mark.parametrize("more", [[], ["--optim", "adamw8bit"]], ids=["adamw", "adamw8bit"])
def test_what_is_reckoned_covers_what_is_written(
    more: list[str], tiny_base: Path, lora_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not by more than what it sets aside for the files beside the tensors."""
    needed = []
    monkeypatch.setattr(Saver, "check_disk_space", lambda self: needed.append(self.needed))
    job = Job(tiny_base, lora_config, tmp_path / "run", {}, ranks=1)
    finetune(parse(FinetuneConfig, job.flags("--max_steps", "1", *more)))
    written = sum(path.stat().st_size for path in (job.output / "epoch0-iter1").iterdir())
    assert len(set(needed)) == 1 and len(needed) == 2  # before the first step, and before the save
    assert written < needed[0] < written + (17 << 20)


def test_too_little_room(tmp_path: Path) -> None:
    check_disk_space(tmp_path, 1)
    with pytest.raises(DiskFullError, match=r"a checkpoint needs 1,000,000,000,000,000,000 bytes, [\d,]+ are free"):
        check_disk_space(tmp_path, 10**18)
    with pytest.raises(CheckpointError, match=r"gone: cannot be looked at \(No such file"):
        check_disk_space(tmp_path / "gone", 1)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFullError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), DiskFullError),
        (OSError(errno.EFBIG, "File too large"), DiskFullError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), DiskFullError),
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
        (SafetensorError("I/O error: Permission denied (os error 13)"), CheckpointError),
    ],
    ids=str,
)
def test_which_fault_it_is(error: Exception, kind: type[CheckpointError], tmp_path: Path) -> None:
    found = disk_fault(tmp_path / "epoch0", error)
    assert type(found) is kind and str(error) in str(found) and "bytes are free" in str(found)
    assert type(disk_fault(tmp_path / "gone" / "epoch0", error)) is kind
