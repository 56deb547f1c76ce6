"""Every kernel compiles for the GPUs it is meant for, and as wide as it is meant (computed in compile_worker.py)."""

from __future__ import annotations

import json
from pathlib import Path

WORKER = Path(__file__).with_name("compile_worker.py")


def test_for_an_h100(python, tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does, and no interpreted result tells of narrow loads or spills."""
    done = python(WORKER, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    assert len(found) == 56
    for name, counts in found.items():
        assert counts["ld"] > 0, name
        # A few results of a row are no 16 bytes.
        assert counts["st"] > 0 or name.startswith(("cross_entropy _statistics", "decoding")), name
        assert counts["spilled"] == 0, name
        assert counts["shared"] <= 99 << 10, name  # what the smallest of recent GPUs has for a program
