"""Requests of the lm-eval harness answered by our model and by its own."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import ConfigError
from tests.eval.published import words

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval.api.instance import Instance

from accessory.eval.harness_model import HarnessModel, sampling

pytestmark = pytest.mark.slow


def test_text_and_answers_are_those_of_the_harness(both) -> None:
    """Whole texts in windows, with a document longer than the model; greedy answers up to a text that ends them."""
    ours, theirs = (harness._asked for harness in both)
    texts = [words(1, 9), " ".join(words(seed, 60) for seed in range(9))]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    ours.model.max_seq_len = theirs._max_length = 100
    one, other = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    ours.model.max_seq_len = theirs._max_length = 256
    assert one == pytest.approx(other, abs=1e-2)
    how = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (words(seed, seed + 2), dict(how)), seed) for seed in range(5)]
    asked.append(Instance("generate_until", {}, (words(9, 3), {"until": [], "max_gen_toks": 3}), 5))
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert len(set(map(len, found))) > 1 and not any("e" in answer for answer in found[:5])


def test_protocol_03_is_a_sum_of_log_p(both) -> None:
    """By hand: each text tokenized by itself, no BOS, every token of the continuation after those before it."""
    model = both[0]._asked.model
    pairs = [(f"Question: {words(seed, 6)}\nAnswer:", f" {words(seed + 1, 3)}") for seed in range(3)]
    found = HarnessModel(model, "0.3").loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, more), (log_p, _) in zip(pairs, found, strict=True):
        ids, total = model.tokenizer.encode(context), 0.0
        for token in model.tokenizer.encode(more):
            total += model.logits(torch.tensor(ids), (len(ids),))[-1].double().log_softmax(0)[token].item()
            ids.append(token)
        assert log_p == pytest.approx(total, abs=1e-4)


@pytest.mark.parametrize(("wanted", "said"), [
    ({}, (256, 0.0, 1.0, ())),
    ({"until": "\n", "max_new_tokens": 7}, (7, 0.0, 1.0, ("\n",))),
    ({"until": ["", "."], "max_gen_toks": 3, "temperature": 0.5, "top_p": 0.9}, (3, 0.5, 0.9, (".",))),
    ({"do_sample": False, "temperature": 0.5}, (256, 0.0, 1.0, ())),
    ({"max_gen_toks": None, "max_tokens": 5, "do_sample": True, "temperature": None}, (5, 0.0, 1.0, ())),
])  # fmt: skip
def test_what_a_task_asks_for(wanted: dict, said: tuple) -> None:
    how = sampling(wanted)
    assert (how.max_gen_len, how.temperature, how.top_p, how.stop) == said


def test_what_no_task_can_ask_for() -> None:
    with pytest.raises(ConfigError, match="'top_p' is 2"):
        sampling({"top_p": 2})
