"""Likelihoods of many continuations against log-softmax of each one's whole logits."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import ConfigError
from accessory.eval.scoring import Continuation, Likelihood, likelihoods
from accessory.meta import MetaModel


def ids(count: int, seed: int) -> list[int]:
    """Random token ids."""
    return torch.randint(2, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def by_itself(model: MetaModel, given: Continuation) -> Likelihood:
    """One continuation, computed alone, in float64 behind the logits."""
    whole = torch.tensor([*given.context, *given.tokens])[-model.max_seq_len - 1 :]
    logits = model.logits(whole[:-1], (len(whole) - 1,)).double().log_softmax(1)[-len(given.tokens) :]
    labels = whole[-len(given.tokens) :]
    return Likelihood(logits.gather(1, labels[:, None]).sum().item(), bool((logits.argmax(1) == labels).all()))


def continuations(model: MetaModel) -> list[Continuation]:
    """Choices with and without first words in common, prefixes of others, equals, long contexts, likely answers."""
    context, words = ids(20, 0), ids(9, 1)
    found = [Continuation(context, words[:n]) for n in (3, 9, 1, 3)]
    found += [Continuation(context, [*words[:5], *ids(4, seed)]) for seed in (2, 3)]
    found += [Continuation(context + words[:2], words[2:9]), Continuation(context[:1], words)]
    found += [Continuation(ids(length, 9), ids(6, 5)) for length in (124, 150, 1)]
    likely = model.logits(torch.tensor(context), (20,))[-1].argmax().item()
    return [*found, Continuation(context, [likely]), Continuation([*ids(5, 7), *context], [likely])]


@pytest.mark.parametrize("tokens_at_once", [None, 40, 1])
def test_equals_each_by_itself(model: MetaModel, tokens_at_once: int | None) -> None:
    """In any batches; the bar is told of each continuation once."""
    given, told = continuations(model), []
    found = likelihoods(model, given, tokens_at_once, told.append)
    assert sum(told) == len(given)
    for one, other in zip(found, (by_itself(model, each) for each in given), strict=True):
        assert one.log_p == pytest.approx(other.log_p, abs=1e-4)
        assert one.greedy == other.greedy
    assert [each.greedy for each in found].count(True) >= 1


def test_what_several_begin_with_is_computed_once(model: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first words of choices too, and equal requests; a last token is not read."""
    computed, score = [], MetaModel.token_scores
    monkeypatch.setattr(
        MetaModel, "token_scores", lambda self, batch: computed.append(len(batch.tokens)) or score(self, batch)
    )
    context, first = ids(30, 0), ids(10, 1)
    choices = [Continuation(context, [*first, *ids(4, seed)]) for seed in (2, 3, 3)]
    likelihoods(model, choices)
    assert computed == [30 + 10 - 1 + 4 + 4]  # the last common token predicts different ones, and is read twice
    likelihoods(model, [Continuation(ids(30, seed), ids(2, seed)) for seed in (4, 5)])
    assert computed[1] == 2 * 31


@pytest.mark.parametrize("given", [Continuation([], [3]), Continuation([3], []), Continuation([3], [4] * 129)])
def test_what_cannot_be_scored(model: MetaModel, given: Continuation) -> None:
    with pytest.raises(ConfigError, match=r"expected at least one after one, and at most 128 \(--max_seq_len\)"):
        likelihoods(model, [given])
