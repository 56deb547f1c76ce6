"""Which checkpoints go. What stays in a whole run is in tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.checkpoint import retention
from accessory.checkpoint.retention import Retention, remove
from tests.checkpoint.made_checkpoints import checkpoint, flip


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
    read, verify = [], retention.verify
    monkeypatch.setattr(retention, "verify", lambda path: read.append(path.name) or verify(path))
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
