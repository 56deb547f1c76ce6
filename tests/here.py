"""Commands run in this process: a process of its own takes seconds to start."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from accessory.parallel import groups

ROOT = Path(__file__).resolve().parents[1]


def run_here(script: str, *arguments: object) -> int | str:
    """Run `python SCRIPT ARGUMENTS`, the script's path counted from the root; what it leaves with: 0 or its status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(sys, "path", ["", *sys.path])  # whose first entry a script replaces
        patch.setattr(groups, "end_process", sys.exit)  # it would end the tests, with a status of 0
        patch.setattr(groups, "_witness", None)  # left standing, it would take this fault for an echo
        patch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=1")  # training would start its process anew to set it
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as left:
            return left.code or 0
        return 0
