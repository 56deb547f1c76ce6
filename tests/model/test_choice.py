"""The choice of a token, against transformers' logits processors."""

from __future__ import annotations

import pytest
import torch
import transformers

from accessory.model.choice import NOTHING, Choice, Seen, candidates, choose

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])


def drawn(top_p: float, temperature: float = 1.0) -> torch.Tensor:
    """Shares [5] of the tokens among 20,000 draws from PROBABILITIES."""
    logits = PROBABILITIES.log().expand(20000, 5)
    tokens = choose(logits, Choice(temperature, top_p=top_p), [torch.Generator().manual_seed(0)])
    return tokens.bincount(minlength=5) / len(tokens)


@pytest.mark.parametrize(
    ("top_p", "nucleus"),
    [(0.0, [1]), (0.3, [1]), (0.5, [1, 3]), (0.7, [1, 3, 4]), (0.86, [0, 1, 3, 4]), (1.0, [0, 1, 2, 3, 4])],
)
def test_nucleus_is_the_smallest_that_reaches_top_p(top_p: float, nucleus: list[int]) -> None:
    """Only its tokens are drawn, in the proportions they had."""
    shares = drawn(top_p)
    wanted = torch.zeros(5)
    wanted[nucleus] = PROBABILITIES[nucleus] / PROBABILITIES[nucleus].sum()
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.015)
    assert set(shares.nonzero()[:, 0].tolist()) == set(nucleus)


def test_temperature_sharpens() -> None:
    """At 0.5 probabilities are squared, before the nucleus is cut."""
    wanted = PROBABILITIES.square() / PROBABILITIES.square().sum()
    torch.testing.assert_close(drawn(1.0, 0.5), wanted, rtol=0, atol=0.015)
    assert drawn(0.5, 0.5).nonzero()[:, 0].tolist() == [1]


def test_temperature_zero_is_the_argmax() -> None:
    """Without drawing."""
    logits = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(choose(logits, Choice(0.0, top_p=0.9), [None]), logits.argmax(-1))


@pytest.mark.parametrize("choice", [Choice(0.7), Choice(1.0, top_k=9), Choice(1.3, top_p=0.8), Choice(1.0, min_p=0.05)])
def test_draws_are_those_of_torch(choice: Choice) -> None:
    """Seed by seed, of all documents together and one by one, and what is drawn next."""
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 3
    probabilities, order = candidates(logits, choice)
    for seed in range(20):
        mine, other = (torch.Generator().manual_seed(seed) for _ in range(2))
        for _ in range(3):
            wanted = order.gather(1, torch.multinomial(probabilities, 1, generator=other))[:, 0]
            assert torch.equal(choose(logits, choice, [mine]), wanted)
        mine, other = ([torch.Generator().manual_seed(seed + i) for i in range(6)] for _ in range(2))
        alone = [
            torch.multinomial(part, 1, generator=one) for part, one in zip(probabilities.split(1), other, strict=True)
        ]
        assert torch.equal(choose(logits, choice, mine), order.gather(1, torch.cat(alone))[:, 0])


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nothing_is_drawn_from_what_is_no_number(wrong: float) -> None:
    """The other documents' tokens are drawn."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    logits[1, 7] = wrong
    tokens = choose(logits, Choice(1.0, top_p=0.9), [torch.Generator().manual_seed(0)])
    assert tokens[1] == NOTHING and 0 <= min(tokens[0], tokens[2]) <= max(tokens[0], tokens[2]) < 50


def theirs(ids: torch.Tensor, logits: torch.Tensor, choice: Choice) -> torch.Tensor:
    """What transformers draws from: probabilities [B, V] after its processors, in its own order."""
    processors = [
        transformers.RepetitionPenaltyLogitsProcessor(choice.repetition_penalty),
        transformers.TemperatureLogitsWarper(choice.temperature),
    ]
    if choice.top_k:
        processors.append(transformers.TopKLogitsWarper(choice.top_k))
    if choice.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(choice.top_p))
    if choice.min_p:
        processors.append(transformers.MinPLogitsWarper(choice.min_p))
    for process in processors:
        logits = process(ids, logits)
    return logits.softmax(-1)


@pytest.mark.parametrize(
    "choice",
    [
        Choice(1.0, top_k=1),
        Choice(0.7, top_k=7),
        Choice(1.3, top_k=10**6),
        Choice(1.0, min_p=0.1),
        Choice(2.0, min_p=1.0),
        Choice(1.0, repetition_penalty=1.4),
        Choice(0.8, repetition_penalty=0.6),
        Choice(1.5, top_k=12, top_p=0.8),
        Choice(0.9, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.2),
    ],
)
def test_cuts_equal_transformers(choice: Choice) -> None:
    """Alone and one after the other, on 40 rows of 60 logits of both signs."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(40, 60, generator=generator)
    ids = torch.randint(0, 60, (40, 9), generator=generator)
    seen = Seen(ids[:, :8].tolist(), 60, logits.device)
    seen.add(ids[:, 8])
    wanted = theirs(ids, logits, choice)
    probabilities, order = candidates(seen.penalize(logits, choice.repetition_penalty), choice)
    found = torch.zeros_like(logits).scatter_(1, order, probabilities)
    torch.testing.assert_close(found / found.sum(1, keepdim=True), wanted)
    drawn = choose(logits, choice, [torch.Generator().manual_seed(1)], seen)
    assert (wanted.gather(1, drawn[:, None]) > 0).all()
    assert (choose(logits, choice._replace(temperature=0.0), [None], seen) == wanted.argmax(1)).all()
    seen.keep([3, 5])
    assert torch.equal(seen.penalize(logits[[3, 5]], 2.0), theirs_penalized(ids[[3, 5]], logits[[3, 5]]))


def theirs_penalized(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """By 2."""
    return transformers.RepetitionPenaltyLogitsProcessor(2.0)(ids, logits)


def test_ids_beyond_the_vocabulary_are_not_seen() -> None:
    assert Seen([[1, 9], [-3]], 3, torch.device("cpu")).marks.tolist() == [[False, True, False], [False] * 3]
