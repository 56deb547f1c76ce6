"""Agreement, tensor and data parallelism on two real ranks (checks in worker.py)."""

from __future__ import annotations

from pathlib import Path


def test_two_ranks(torchrun) -> None:
    done = torchrun(2, Path(__file__).with_name("worker.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("OK") == 2  # one a rank; their lines may run into each other
