"""Cross-entropy in C++ against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from accessory.kernels.avx512 import cross_entropy
from accessory.kernels.avx512.cross_entropy import become_gradient, statistics
from tests.kernels.scores import check_padding_alone, exact, over_slices, problem

HALF_STEP = 1.01 * 2**-8


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 63, 64, 65, 1000, 49152])
@pytest.mark.parametrize(("ranks", "padding"), [(1, 0), (1, 3), (2, 0), (3, 0.7), (2, 1.0)])
def test_equals_float64(ranks: int, padding: float, columns: int) -> None:
    """Whole or in slices, around whole registers, with padding above any score that may be a whole slice."""
    padded_to = columns * ranks
    vocabulary = padded_to - (int(padding * columns) if ranks > 1 else min(int(padding), columns - 1))
    scores, labels = problem(5, vocabulary, torch.bfloat16)
    wanted_losses, wanted = exact(scores, labels)
    padded = F.pad(scores, (0, padded_to - vocabulary), value=100.0)
    slices = [part.contiguous() for part in padded.chunk(ranks, 1)]
    losses = over_slices(cross_entropy, slices, labels, vocabulary)
    torch.testing.assert_close(losses.double(), wanted_losses, rtol=1e-6, atol=2e-6)
    gradient = torch.cat(slices, 1)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient[:, :vocabulary].double(), wanted, rtol=HALF_STEP, atol=2e-7)
    assert not gradient[:, vocabulary:].any()


@pytest.mark.usefixtures("threads")
def test_neither_threads_nor_other_rows_change_a_bit() -> None:
    """Each row is one thread's."""
    scores, labels = problem(7, 300, torch.bfloat16)
    whole = scores.clone()
    found = statistics(whole, labels)
    become_gradient(whole, labels, *found[:2])
    torch.set_num_threads(1)
    for row in range(7):
        alone, label = scores[row : row + 1].clone(), labels[row : row + 1]
        of_row = statistics(alone, label)
        become_gradient(alone, label, *of_row[:2])
        assert torch.equal(alone[0], whole[row])
        assert all(torch.equal(one, other[row : row + 1]) for one, other in zip(of_row, found, strict=True))


def test_huge_scores_do_not_overflow_and_nan_shows() -> None:
    """The highest is taken off first; a row with a NaN or an infinity has a NaN for a loss, and others do not."""
    scores, labels = problem(4, 40, torch.bfloat16)
    scores *= 1000
    wanted, _ = exact(scores, labels)
    highest, mass, target = statistics(scores, labels)
    torch.testing.assert_close((mass.log() + highest - target).double(), wanted, rtol=1e-6, atol=1e-6)
    scores[1, 37], scores[3, 0] = torch.nan, torch.inf
    highest, mass, target = statistics(scores, labels)
    assert (mass.log() + highest - target).isnan().tolist() == [False, True, False, True]
    become_gradient(scores, labels, highest, mass)
    assert scores.isnan().any(1).tolist() == [False, True, False, True]


def test_a_score_of_minus_infinity_has_no_probability() -> None:
    """As in PyTorch: nothing is added for it, and it gets no gradient."""
    scores, labels = problem(3, 40, torch.bfloat16)
    scores[:, 5] = -torch.inf
    wanted_losses, wanted = exact(scores, labels)
    highest, mass, target = statistics(scores, labels)
    torch.testing.assert_close((mass.log() + highest - target).double(), wanted_losses, rtol=1e-6, atol=1e-6)
    become_gradient(scores, labels, highest, mass)
    torch.testing.assert_close(scores.double(), wanted, rtol=HALF_STEP, atol=1e-6)


def test_a_rank_of_padding_alone() -> None:
    check_padding_alone(cross_entropy, torch.bfloat16)


def test_a_label_in_the_padding_shows() -> None:
    """Its loss is infinite, as that of a token with no probability; no other's gradient is touched."""
    scores, labels = problem(3, 10, torch.bfloat16)
    highest, mass, target = statistics(scores, labels, 9)
    assert (mass.log() + highest - target).isinf().tolist() == [False, False, True]
    become_gradient(scores, labels, highest, mass, 9)
    torch.testing.assert_close(scores[2, :9].float().sum(), torch.tensor(1.0), rtol=0.01, atol=0)
    assert not scores[:, 9].any()


def test_rows_of_a_wider_buffer() -> None:
    """Between the rows nothing is read or written."""
    buffer = torch.full((3, 32), torch.nan).bfloat16()
    scores, labels = problem(3, 20, torch.bfloat16)
    buffer[:, :20] = scores
    wanted, gradient = exact(scores, labels)
    highest, mass, target = statistics(buffer[:, :20], labels)
    torch.testing.assert_close((mass.log() + highest - target).double(), wanted, rtol=1e-6, atol=1e-6)
    become_gradient(buffer[:, :20], labels, highest, mass)
    torch.testing.assert_close(buffer[:, :20].double(), gradient, rtol=HALF_STEP, atol=1e-6)
    assert buffer[:, 20:].isnan().all()


def test_no_rows() -> None:
    """Nothing in, nothing out."""
    scores, labels = torch.empty(0, 8, dtype=torch.bfloat16), torch.empty(0, dtype=torch.int64)
    highest, mass, target = statistics(scores, labels)
    assert highest.shape == mass.shape == target.shape == (0,)
    become_gradient(scores, labels, highest, mass)
