"""Scores of tokens against log-softmax and argmax of whole logits in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accessory.model.loss import CHUNK, cross_entropy_sum
from accessory.model.scores import token_scores
from tests.model.test_loss import VOCABULARY, Largest, lesson, problem


def by_torch(hidden: Tensor, head: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """log p, and whether it is the first of the highest, of the labels that are not negative."""
    kept = labels >= 0
    scores = (hidden[kept] @ head.t()).log_softmax(1)
    return scores.gather(1, labels[kept][:, None])[:, 0], scores.argmax(1) == labels[kept]


def likely_problem(tokens: int, dtype: torch.dtype, ignore_every: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """A problem in which every fourth label is the likeliest."""
    hidden, head, labels = problem(tokens, dtype, ignore_every)
    labels[1::4] = torch.where(labels >= 0, (hidden @ head.t()).argmax(1), labels)[1::4]
    return hidden, head, labels


@pytest.mark.parametrize("supervised", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_equals_torch_in_float64(supervised: int) -> None:
    """Around the borders of chunks, with ignored tokens in between; no gradient is recorded."""
    hidden, head, labels = likely_problem(supervised + 7, torch.float64, ignore_every=0)
    labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[:7]] = -100
    found = token_scores(hidden.requires_grad_(), head, labels)
    wanted, likeliest = by_torch(hidden.detach(), head, labels)
    torch.testing.assert_close(found.log_p, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.likeliest, likeliest)
    assert supervised < 9 or 0 < likeliest.sum() < supervised
    assert not found.log_p.requires_grad


@pytest.mark.parametrize("kernels_wanted", ["0", "1"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.2), (torch.float16, 0.02)])
def test_narrow_is_close_to_float64(
    switch_cpu_kernels: Callable[[bool], None], dtype: torch.dtype, tolerance: float, kernels_wanted: str
) -> None:
    """Each token's; log p is fp32 and adds up to the loss."""
    switch_cpu_kernels(kernels_wanted == "1")
    hidden, head, labels = likely_problem(700, dtype)
    found = token_scores(hidden, head, labels)
    wanted, _ = by_torch(hidden.double(), head.double(), labels)
    assert found.log_p.dtype == torch.float32
    torch.testing.assert_close(found.log_p.double(), wanted, rtol=0, atol=tolerance)
    torch.testing.assert_close(-found.log_p.sum(), cross_entropy_sum(hidden, head, labels), rtol=1e-6, atol=0)
    assert torch.equal(found.likeliest, by_torch(hidden, head, labels)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_rows_take_no_part(dtype: torch.dtype) -> None:
    """However large they are."""
    hidden, head, labels = likely_problem(40, dtype)
    padded = torch.cat([head, 100 * torch.ones(3, head.shape[1], dtype=dtype)])
    for one, other in zip(
        token_scores(hidden, padded, labels, VOCABULARY)[:2], token_scores(hidden, head, labels)[:2], strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_the_divergence_from_a_teacher(dtype: torch.dtype, tolerance: float) -> None:
    """Each token's over several chunks, by the formula in fp64, of the tokens that both have; log p is as ever."""
    hidden, head, labels = likely_problem(2 * CHUNK + 99, dtype)
    given, kept = lesson(len(labels), dtype, 0.3, 2.5, compared=47), labels >= 0
    found, untaught = (token_scores(hidden, head, labels, teaching=each) for each in (given, None))
    own, theirs = hidden.double() @ head.double().t(), given.hidden.double() @ given.head.double().t()
    q, p = ((logits[kept, :47] / 2.5).log_softmax(1) for logits in (own, theirs))
    torch.testing.assert_close(
        found.divergences.double(), 2.5**2 * (p.exp() * (p - q)).sum(1), rtol=tolerance, atol=tolerance
    )
    assert all(map(torch.equal, found[:2], untaught[:2])) and untaught.divergences is None


def test_the_first_of_equals_is_the_likeliest() -> None:
    """As argmax has it."""
    hidden, head = torch.ones(3, 2), torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.5, 1.5]])
    assert token_scores(hidden, head, torch.tensor([1, 2, 3])).likeliest.tolist() == [True, False, False]


def test_logits_are_never_all_alive() -> None:
    """No tensor is larger than one chunk's logits."""
    hidden, head, labels = problem(2048, torch.float32, ignore_every=0)
    with Largest() as largest:
        token_scores(hidden, head, labels)
    assert largest.numel <= CHUNK * VOCABULARY
