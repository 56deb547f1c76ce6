"""The newest whole checkpoint is the one to go on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.checkpoint.latest import latest_checkpoint
from accessory.checkpoint.manifest import MANIFEST_FILE
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
