"""Logits and likelihoods of examples, against transformers' logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.errors import DataError
from accessory.meta import MetaModel
from tests.meta.byte_models import VOCABULARY


def test_logits_of_examples(model: MetaModel) -> None:
    """Of texts and of ids, one or many, with or without what begins and ends a document."""
    texts = ["Hello", "é?"]
    found = model.compute_logits(texts)
    for text, logits in zip(texts, found, strict=True):
        ids = torch.tensor(model.prompt_tokens(text))
        torch.testing.assert_close(logits, model.logits(ids, (len(ids),)), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.compute_logits(text), model.compute_logits(ids))
        assert torch.equal(model.compute_logits(ids.tolist()), model.compute_logits([ids.tolist()])[0])
    assert model.compute_logits("Hello", bos=False, eos=True).shape == (6, VOCABULARY)
    assert model.compute_logits([]) == []
    for wrong, said in (
        ([[]], r"example 0 has the tokens \[\]; expected one or more of 0 to 257"),
        (["a", [1, 258]], "example 1 has the tokens"),
        (3, "examples are 3; expected a text or ids"),
        ([1.5], "examples are"),
    ):
        with pytest.raises(DataError, match=said):
            model.compute_logits(wrong)


def test_examples_are_evaluated(checkpoint, tmp_path: Path) -> None:
    """Against float64 over transformers' logits; the answer that the model gives is the likeliest, token for token."""
    theirs, ours = checkpoint().double(), MetaModel.from_pretrained(tmp_path, dtype="fp32")
    likely = theirs.generate(torch.tensor([ours.prompt_tokens("Hello")]), max_new_tokens=3, do_sample=False)[0].tolist()
    examples, contexts = [ours.prompt_tokens("Hello you"), likely], [ours.prompt_tokens("Hello")] * 2
    found = ours.evaluate_examples(examples, contexts)
    for place, (ids, known) in enumerate(((examples[0], 6), (likely, 6))):
        each = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)[range(known - 1, len(ids) - 1), ids[known:]]
        assert found["log_likelihood"][place] == pytest.approx(each.sum().item(), rel=1e-5)
        assert found["ppl"][place] == pytest.approx(each.mean().neg().exp().item(), rel=1e-5)
        assert found["non_context_logits"][place].shape == (len(ids) - known, VOCABULARY)
    assert found["max_equal"] == [False, True]
    alone = ours.evaluate_examples("Hello you", "Hello")
    assert alone["log_likelihood"] == pytest.approx(found["log_likelihood"][0], rel=1e-6)
    whole = ours.evaluate_examples(["Hello you"], eos=True)
    assert whole["non_context_logits"][0].shape == (10, VOCABULARY)
    for wrong, said in (
        ((["Hello"], ["Help"]), "example 0 has 6 tokens and its context 5, of which it begins with 4"),
        ((["Hello"], ["Hello"]), "example 0 has 6 tokens and its context 6, of which it begins with 6"),
        ((["Hello"], "Hello"), "expected one for each of the 1 examples"),
    ):
        with pytest.raises(DataError, match=said):
            ours.evaluate_examples(*wrong)
