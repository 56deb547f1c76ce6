"""Cross-entropy over a chunk of logits against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accessory.kernels.operands import DTYPES
from accessory.kernels.triton import cross_entropy
from accessory.kernels.triton.cross_entropy import become_gradient, statistics
from tests.kernels.scores import check_padding_alone, exact, over_slices, problem

HALF_STEP = {torch.float32: 2e-7, torch.bfloat16: 1.01 * 2**-8, torch.float16: 1.01 * 2**-11}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("ranks", "padding"), [(1, 0), (1, 3), (2, 0), (3, 7)])
def test_equals_float64(monkeypatch: pytest.MonkeyPatch, ranks: int, padding: int, dtype: torch.dtype) -> None:
    """Rows of several blocks, whole or in slices, with padding that may be a whole slice and is above any score."""
    monkeypatch.setattr(cross_entropy, "BLOCK", 8)
    vocabulary = 6 * ranks * (ranks + 1) - padding
    scores, labels = problem(9, vocabulary, dtype)
    wanted_losses, wanted = exact(scores, labels)
    padded = torch.cat([scores, torch.full((9, padding), 100.0, dtype=dtype)], 1)
    slices = [part.contiguous() for part in padded.chunk(ranks, 1)]
    losses = over_slices(cross_entropy, slices, labels, vocabulary)
    torch.testing.assert_close(losses.double(), wanted_losses, rtol=1e-6, atol=2e-6)
    gradient = torch.cat(slices, 1)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient[:, :vocabulary].double(), wanted, rtol=HALF_STEP[dtype], atol=1e-6)
    assert not gradient[:, vocabulary:].any()


def test_a_rank_of_padding_alone() -> None:
    check_padding_alone(cross_entropy, torch.float32)


def test_huge_scores_do_not_overflow_and_nan_shows() -> None:
    """The highest is taken off first; a row with a NaN has a NaN for a loss, and others do not."""
    scores, labels = problem(3, 20)
    scores *= 1000
    wanted, _ = exact(scores, labels)
    highest, mass, target = statistics(scores, labels)
    torch.testing.assert_close((mass.log() + highest - target).double(), wanted, rtol=1e-6, atol=1e-6)
    scores[1, 7] = torch.nan
    highest, mass, target = statistics(scores, labels)
    assert (mass.log() + highest - target).isnan().tolist() == [False, True, False]


def test_a_label_in_the_padding_shows() -> None:
    """Its loss is infinite, as that of a token with no probability."""
    scores, labels = problem(2, 10)
    highest, mass, target = statistics(scores, labels, 9)
    assert (mass.log() + highest - target).isinf().tolist() == [False, True]


def test_rows_of_a_wider_buffer() -> None:
    """Between the rows nothing is read or written."""
    buffer = torch.full((3, 32), torch.nan)
    scores, labels = problem(3, 20)
    buffer[:, :20] = scores
    wanted, gradient = exact(scores, labels)
    highest, mass, target = statistics(buffer[:, :20], labels)
    torch.testing.assert_close((mass.log() + highest - target).double(), wanted, rtol=1e-6, atol=1e-6)
    become_gradient(buffer[:, :20], labels, highest, mass)
    torch.testing.assert_close(buffer[:, :20].double(), gradient, rtol=1e-6, atol=1e-6)
    assert buffer[:, 20:].isnan().all()


def test_rows_far_apart(far: Callable[[Tensor], Tensor]) -> None:
    """Beyond the reach of 32 bits, read and written."""
    scores, labels = problem(3, 20, torch.bfloat16)
    there = far(scores)
    found, wanted = statistics(there, labels), statistics(scores, labels)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    for place in (there, scores):
        become_gradient(place, labels, *wanted[:2])
    assert torch.equal(there, scores)


def test_no_rows() -> None:
    """Nothing in, nothing out."""
    scores, labels = torch.empty(0, 8), torch.empty(0, dtype=torch.int64)
    highest, mass, target = statistics(scores, labels)
    assert highest.shape == mass.shape == target.shape == (0,)
    become_gradient(scores, labels, highest, mass)


def test_what_does_not_fit_is_refused() -> None:
    """Before a pointer is followed beyond its end, or digits are lost."""
    scores, labels = problem(4, 8)
    for given, message in (
        ((scores.double(), labels), "scores is torch.float64; kernels take"),
        ((scores, labels[:3]), r"local is \[3\]; expected \[4\]"),
        ((scores, labels.int()), "local is torch.int32"),
        ((scores, labels.to("meta")), "local is on meta, the rest on cpu"),
        ((scores.t().contiguous().t(), labels), "adjacent columns"),
    ):
        with pytest.raises(AssertionError, match=message):
            statistics(*given)
    highest, mass, _ = statistics(scores, labels)
    for change, message in (
        ({"mass": mass[:3]}, r"mass is \[3\]; expected \[4\]"),
        ({"highest": highest.double()}, "highest is torch.float64"),
    ):
        with pytest.raises(AssertionError, match=message):
            become_gradient(scores, labels, **{"highest": highest, "mass": mass, **change})
