"""Tensor parallelism on two real ranks (checks in worker.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.parallel.tensor import slice_bounds


def test_two_ranks(torchrun) -> None:
    done = torchrun(2, Path(__file__).with_name("worker.py"), "tensor")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("OK") == 2  # one a rank; their lines may run into each other


def test_slice_bounds_cover_everything() -> None:
    assert [slice_bounds(12, rank, 3) for rank in range(3)] == [(0, 4), (4, 8), (8, 12)]
    with pytest.raises(AssertionError, match="cannot be cut"):
        slice_bounds(10, 0, 3)
