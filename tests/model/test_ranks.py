"""Two ranks against one, for every kind of decoder (computed in ranks_worker.py)."""

from __future__ import annotations

from pathlib import Path

import torch

WORKER = Path(__file__).with_name("ranks_worker.py")


def test_two_ranks_equal_one(python, torchrun, tmp_path: Path) -> None:
    """Loss, gradients and their norm, weights, logits and answers, with a vocabulary that two do not divide."""
    runs = python(WORKER, tmp_path / "one", "1"), torchrun(2, WORKER, tmp_path / "two", "2")
    for done in runs:
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 14
    for shape, wanted in one.items():
        assert set(wanted) == set(two[shape])
        for name, value in wanted.items():
            found = two[shape][name]
            difference = (found.double() - value.double()).norm()
            assert found.shape == value.shape, (shape, name)
            assert difference <= 1e-4 * value.double().norm() + 1e-5, (shape, name)  # without rotation, wk has no use
            assert value.isfinite().all(), (shape, name)  # for a bias: its gradient is rounding alone
