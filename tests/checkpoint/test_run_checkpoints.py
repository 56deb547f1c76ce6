"""The newest whole checkpoint is the one to go on from, and which go. What stays in a run is in tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.checkpoint import run_checkpoints
from accessory.checkpoint.manifest import MANIFEST_FILE
from accessory.checkpoint.run_checkpoints import Retention, latest_checkpoint, remove
from accessory.errors import CheckpointError
from tests.checkpoint.made_checkpoints import checkpoint, cut, flip


def test_latest_is_the_one_of_most_steps_that_is_whole(tmp_path: Path) -> None:
    """By steps, not by name or time; damaged ones are named."""
    old, middle, newest = (checkpoint(tmp_path / name, step) for name, step in (("b", 5), ("c", 10), ("a", 20)))
    assert latest_checkpoint(tmp_path) == (newest, [])
    flip(newest / "trainable.safetensors")
    (middle / MANIFEST_FILE).unlink()
    found, faults = latest_checkpoint(tmp_path)
    assert found == old
    assert len(faults) == 2
    assert "has no manifest.json" in faults[0]
    assert "trainable.safetensors has other contents" in faults[1]


def test_what_is_still_being_written_is_none(tmp_path: Path) -> None:
    """It has no name yet; and what is no checkpoint at all is passed over."""
    whole = checkpoint(tmp_path / "epoch0")
    checkpoint(tmp_path / ".epoch1.partial", step=30)
    (tmp_path / "events").mkdir()
    assert latest_checkpoint(tmp_path) == (whole, [])


def test_nothing_whole_never_means_to_begin_anew(tmp_path: Path) -> None:
    """Neither silently nor at all."""
    with pytest.raises(CheckpointError, match=r"holds no checkpoint\. Leave --resume out"):
        latest_checkpoint(tmp_path)
    cut(checkpoint(tmp_path / "epoch0") / "training_state.json")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole.\n.*training_state.json has 1 bytes"):
        latest_checkpoint(tmp_path)


def test_the_lowest_loss_stays_however_old(tmp_path: Path) -> None:
    """Of equal ones the newer; those without a loss are never the best."""
    for step, loss in enumerate([None, 1.0, 1.0, 2.0, 2.0, 2.0], start=1):
        checkpoint(tmp_path / f"epoch{step}", step, loss)
    assert Retention(tmp_path, 2).prune() == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch3", "epoch5", "epoch6"]


def test_order_is_that_of_steps_not_of_names(tmp_path: Path) -> None:
    for name, step in (("epoch9", 1), ("epoch10", 2), ("epoch11", 3)):
        checkpoint(tmp_path / name, step, -float(step))
    Retention(tmp_path, 2).prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch10", "epoch11"]


def test_damaged_ones_neither_count_nor_go(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint(tmp_path / f"epoch{step}", step, 6.0 - step)
    flip(tmp_path / "epoch5" / "run.json")
    flip(tmp_path / "epoch1" / "run.json")
    Retention(tmp_path, 2).prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch1", "epoch3", "epoch4", "epoch5"]


def test_each_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing all of them at every save would take longer than the save; one that was written anew is read again."""
    read, verify = [], run_checkpoints.verify
    monkeypatch.setattr(run_checkpoints, "verify", lambda path: read.append(path.name) or verify(path))
    keep = Retention(tmp_path, 9)
    for step in (1, 2):
        checkpoint(tmp_path / f"epoch{step}", step, 1.0)
        keep.prune()
    assert read == ["epoch1", "epoch2"]
    remove(tmp_path / "epoch2")
    checkpoint(tmp_path / "epoch2", 2, 0.5)
    keep.prune()
    assert read == ["epoch1", "epoch2", "epoch2"]


def test_what_was_left_of_an_earlier_removal_goes_too(tmp_path: Path) -> None:
    (tmp_path / ".epoch1.removed").mkdir()
    assert remove(checkpoint(tmp_path / "epoch1")) is None
    assert list(tmp_path.iterdir()) == []
