"""One run at a time in a directory; the kernel forgets those that died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from accessory.errors import ConfigError
from accessory.run import lock as run_lock
from accessory.run.lock import LOCK_FILE, lock
from tests.conftest import ROOT


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the directory."""
    lines = (
        f"from pathlib import Path; from accessory.run.lock import lock\nwith lock(Path({str(tmp_path)!r})): input()"
    )
    process = subprocess.Popen([sys.executable, "-c", lines], cwd=ROOT, stdin=subprocess.PIPE)
    while not (tmp_path / LOCK_FILE).is_file() or not (tmp_path / LOCK_FILE).read_text():
        assert process.poll() is None
    yield process
    process.kill()
    process.wait()


def test_held_by_another_until_it_dies(holder: subprocess.Popen, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.3)
    with (
        pytest.raises(ConfigError, match=rf"a run is at work there: process {holder.pid} on .*, since 20"),
        lock(tmp_path),
    ):
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with lock(tmp_path):
        assert (tmp_path / LOCK_FILE).read_text().startswith(f"process {os.getpid()} on ")


def test_free_again_after_leaving(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(run_lock, "_PATIENCE", 0.0)
    for _ in range(2):
        with lock(tmp_path), pytest.raises(ConfigError), lock(tmp_path):  # not by the same process either
            pass
        assert not list(tmp_path.iterdir())


def test_a_file_that_its_holder_removed_is_no_lock(tmp_path: Path) -> None:
    """Who opened it before would hold nothing, while the next one holds a new file."""
    path = tmp_path / LOCK_FILE
    with lock(tmp_path):
        waiting = path.open("a+")
    assert not run_lock._taken(waiting.fileno(), path)
    with lock(tmp_path):
        assert not run_lock._taken(waiting.fileno(), path)
    waiting.close()


def test_one_that_is_about_to_die_is_waited_for(holder: subprocess.Popen, tmp_path: Path) -> None:
    holder.stdin.close()  # it ends by itself in a moment
    with lock(tmp_path):
        pass
