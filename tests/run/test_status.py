"""What run_status.json says of a run, from its first step to its end, over several attempts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.errors import ConfigError, NotFiniteError, Preempted, TrainingError
from accessory.run.status import STATUS_FILE, RunStatus, read_status


def status(folder: Path, monkeypatch: pytest.MonkeyPatch, attempt: int = 0, is_main: bool = True) -> RunStatus:
    """Of an attempt."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    return RunStatus(folder, 2, is_main)


def test_a_run_that_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = status(tmp_path, monkeypatch)
    now.begin(0)
    assert read_status(tmp_path)["state"] == "running" and read_status(tmp_path)["status"] is None
    now.saved(4, tmp_path / "epoch0-iter4")
    assert (read_status(tmp_path)["step"], read_status(tmp_path)["checkpoint"]) == (4, "epoch0-iter4")
    now.end(None)
    assert (read_status(tmp_path)["state"], read_status(tmp_path)["status"]) == ("finished", 0)
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]


@pytest.mark.parametrize(
    ("error", "state", "number"),
    [(Preempted("x"), "preempted", 75), (NotFiniteError("x"), "failed", 5), (ConfigError("x"), "failed", 2)],
)
def test_one_that_does_not(error, state: str, number: int, tmp_path: Path, monkeypatch) -> None:
    """The rank that prints for the error writes it, main or not."""
    for rank_prints in (False, True):
        now = status(tmp_path, monkeypatch, is_main=False)
        error.prints = rank_prints
        now.end(error)
        assert bool(read_status(tmp_path)) is rank_prints
    found = read_status(tmp_path)
    assert (found["state"], found["status"], found["reason"], found["message"]) == (
        state,
        number,
        type(error).__name__,
        "x",
    )


def test_attempts_without_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in a row that begin at the same step; one that got further begins the count anew."""
    for attempt, step in enumerate([0, 0, 4, 4]):
        status(tmp_path, monkeypatch, attempt).begin(step)
    with pytest.raises(TrainingError, match=r"No progress since step 4: 3 attempts in a row"):
        status(tmp_path, monkeypatch, 4).begin(4)
    status(tmp_path, monkeypatch, 0).begin(4)  # started by hand
    assert read_status(tmp_path)["began_after"] == [4]


def test_files_that_are_none(tmp_path: Path) -> None:
    assert read_status(tmp_path) == {}
    for content in ("", "[1]", "{", "\x00"):
        (tmp_path / STATUS_FILE).write_text(content)
        assert read_status(tmp_path) == {}


def test_a_disk_that_takes_nothing_ends_no_run(tmp_path: Path, monkeypatch, capsys) -> None:
    now = status(tmp_path / "gone", monkeypatch)
    now.begin(0)
    assert "run_status.json: cannot be written (No such file or directory)" in capsys.readouterr().err


def test_nothing_is_written_without_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    now = RunStatus(None, 1, True)
    now.begin(0)
    now.end(None)
    assert json.dumps(now.entries)
