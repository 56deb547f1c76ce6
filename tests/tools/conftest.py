"""Tools called without a process of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.here import run_here


@pytest.fixture
def called(capsys: pytest.CaptureFixture[str]) -> Callable:
    """(tool's path from the root, arguments) -> what a process that ran it would have ended with."""

    def call(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess:
        capsys.readouterr()
        left = run_here(tool, *arguments)
        status, said = (1, f"{left}\n") if isinstance(left, str) else (left, "")
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess([tool, *map(str, arguments)], status, out, err + said)

    return call
