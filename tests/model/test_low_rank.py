"""LoRA's factors: when they drop out, and what."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.model.low_rank import Draw, LoraFactor, LowRank
from accessory.parallel.tensor import WHOLE, Slicing, slicing_of


def low_rank(dropout: float, scale: float = 1.0) -> LowRank:
    """Factors of a linear 6 -> 6, on the meta device."""
    return LowRank(LoraFactor((6, 6), WHOLE), LoraFactor((6, 6), WHOLE), scale, dropout)


def test_factor() -> None:
    """fp32, marked with how it is cut."""
    weight = LoraFactor((4, 32), Slicing(dim=1)).weight
    assert (weight.dtype, tuple(weight.shape), weight.is_meta) == (torch.float32, (4, 32), True)
    assert slicing_of(weight) == Slicing(dim=1)


def test_dropout_only_in_training() -> None:
    """While training a quarter of LoRA's inputs is zero and the rest grown to keep the mean; asked, nothing is lost."""
    torch.manual_seed(0)
    found = low_rank(0.25, scale=3.0)
    draw = found.draw()
    kept = draw.kept(torch.empty(1000, 6))
    assert draw.scale == pytest.approx(4.0)
    assert kept.unique().tolist() == [0.0, 1.0]
    assert (kept == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    found.a.eval()
    assert found.draw() == Draw(3.0)


def test_a_draw_is_the_same_at_every_call() -> None:
    """And another one is another."""
    torch.manual_seed(0)
    found, x = low_rank(0.5), torch.empty(100, 6)
    one, other = found.draw(), found.draw()
    assert torch.equal(one.kept(x), one.kept(x))
    assert not torch.equal(one.kept(x), other.kept(x))


def test_dropout_of_two_ranks(torchrun) -> None:
    """Columns drop the same values of the same input, rows each their own (checks in dropout_worker.py)."""
    done = torchrun(2, Path(__file__).with_name("dropout_worker.py"))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("OK") == 2
