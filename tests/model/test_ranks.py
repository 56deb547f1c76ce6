"""Two ranks against one, for every kind of decoder (computed in ranks_worker.py)."""

from __future__ import annotations

from pathlib import Path

import torch

WORKER = Path(__file__).with_name("ranks_worker.py")


def test_two_ranks_equal_one(python, torchrun, tmp_path: Path) -> None:
    """Loss, gradients and their norm, weights, logits and answers, with a vocabulary that two do not divide.

    In fp32, and the loss in bf16, too.
    """
    runs = python(WORKER, tmp_path / "one", "1"), torchrun(2, WORKER, tmp_path / "two", "2")
    for done in runs:
        assert done.returncode == 0, done.stderr[-4000:]
    one, two = (torch.load(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 25
    for shape, wanted in one.items():
        assert set(wanted) == set(two[shape])
        for name, value in wanted.items():
            found = two[shape][name]
            difference = (found.double() - value.double()).norm()
            assert found.shape == value.shape, (shape, name)
            # Without rotation, wk has no use for a bias: its gradient is rounding alone.
            rounding = 1e-4 if value.dtype != torch.bfloat16 else 5e-3
            assert difference <= rounding * value.double().norm() + 1e-5, (shape, name)
            assert value.isfinite().all(), (shape, name)
