"""Which checkpoint a run begins from, by its flags, its attempt, and what lies in its directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.config import FinetuneConfig
from accessory.errors import CheckpointError, ConfigError
from accessory.run.resuming import find_start
from accessory.run.status import STATUS_FILE
from tests.checkpoint.made_checkpoints import checkpoint, flip


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """(flags, attempt) -> the checkpoint, and what is said of it."""

    def find(attempt: int = 0, before: dict | None = None, **flags: object) -> tuple[Path | None, list[str]]:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
        if attempt and (tmp_path / "out").is_dir():
            (tmp_path / "out" / STATUS_FILE).write_text(json.dumps(before or {"began_after": [0], "launch": "mine"}))
        given = {"pretrained_path": [tmp_path], "data_config": tmp_path, "output_dir": tmp_path / "out"}
        return find_start(FinetuneConfig(**given | flags))

    return find


def test_nothing_is_there(start, tmp_path: Path) -> None:
    """In a directory that is not, is empty, or holds other things; also for an attempt that saved nothing before."""
    assert start() == start(attempt=1) == (None, [])
    (tmp_path / "out" / "events").mkdir(parents=True)
    assert start() == start(attempt=1) == start(attempt=1, resume="latest") == (None, [])
    with pytest.raises(CheckpointError, match=r"holds no checkpoint\. Leave --resume out"):
        start(resume="latest")


def test_the_newest_whole_one(start, tmp_path: Path) -> None:
    older, newer = (checkpoint(tmp_path / "out" / f"epoch{n}", n) for n in (1, 2))
    assert start(resume="latest")[0] == start(attempt=1)[0] == newer
    flip(newer / "run.json")
    for found, notes in (start(resume="latest"), start(attempt=1)):
        assert found == older and "epoch2: is damaged: run.json" in notes[0]
    flip(older / "run.json")
    for more in ({"resume": "latest"}, {"attempt": 1}, {"attempt": 1, "resume": "latest"}):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
            start(**more)


def test_a_restarted_attempt_never_goes_back_behind_its_beginning(start, tmp_path: Path) -> None:
    """Begun from another directory's step 7: the newest here may be of before that, or of after."""
    elsewhere = checkpoint(tmp_path / "elsewhere", 7)
    checkpoint(tmp_path / "out" / "epoch0", 3)
    assert start(attempt=1, resume=elsewhere)[0] == elsewhere
    checkpoint(tmp_path / "out" / "epoch1", 7)
    assert start(attempt=1, resume=elsewhere)[0] == elsewhere
    newer = checkpoint(tmp_path / "out" / "epoch2", 9)
    assert start(attempt=1, resume=elsewhere)[0] == newer


@pytest.mark.parametrize("before", [{"began_after": [], "launch": "mine"}, {"began_after": [0], "launch": "other"}])
def test_a_later_attempt_of_a_run_that_never_began_takes_over_nothing(start, tmp_path: Path, before: dict) -> None:
    """Its first one was refused, or died early: what lies there is an older run's, and refused again."""
    checkpoint(tmp_path / "out" / "epoch1", 1)
    with pytest.raises(ConfigError, match=r"further than where this run begins: epoch1\."):
        start(attempt=1, before=before)


def test_another_course_of_the_run_is_in_the_way(start, tmp_path: Path) -> None:
    """For a fresh start all checkpoints, for one from step 2 those after it; a dry run changes nothing."""
    out = tmp_path / "out"
    second = checkpoint(out / "epoch2", 2)
    for n in (1, 3):
        checkpoint(out / f"epoch{n}", n)
    flip(checkpoint(out / "epoch4", 4) / "manifest.json")
    with pytest.raises(ConfigError, match=r"begins: epoch1, epoch2, epoch3, epoch4\. Go on from"):
        start()
    with pytest.raises(ConfigError, match=r"begins: epoch3, epoch4\. Go on from"):
        start(resume=second)
    assert start(resume=second, dry_run=True) == (second, [])
    assert len(list(out.iterdir())) == 4
    assert start(resume=second, overwrite=True) == (second, ["--overwrite: removed epoch3, epoch4"])
    assert sorted(path.name for path in out.iterdir()) == ["epoch1", "epoch2"]
    assert start(overwrite=True) == (None, ["--overwrite: removed epoch1, epoch2"])
    assert not list(out.iterdir())


def test_what_cannot_be_taken_out_of_the_way(start, tmp_path: Path) -> None:
    """A later run would resume from it: the error names each."""
    for n in (1, 2):
        checkpoint(tmp_path / "out" / f"epoch{n}", n)
        (tmp_path / "out" / f".epoch{n}.removed").touch()  # where a directory is moved to before it is removed
    with pytest.raises(ConfigError) as caught:
        start(overwrite=True)
    faults = [f"{tmp_path}/out/epoch{n}: could not be removed (Not a directory)" for n in (1, 2)]
    assert str(caught.value) == "\n".join(["--overwrite:", *faults])
