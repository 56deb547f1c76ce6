"""Tools called without a process of their own, which takes seconds to start."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from accessory.parallel import groups

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def called(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable:
    """(tool's path from the root, arguments) -> what a process that ran it would have ended with."""

    def call(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess:
        words = [tool, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "path", ["", *sys.path])  # whose first entry a tool replaces
        monkeypatch.setattr(groups, "end_process", sys.exit)  # it would end the tests, with a status of 0
        capsys.readouterr()
        status, said = 0, ""
        try:
            runpy.run_path(str(ROOT / tool), run_name="__main__")
        except SystemExit as left:
            status, said = (1, f"{left.code}\n") if isinstance(left.code, str) else (left.code or 0, "")
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, out, err + said)

    return call
