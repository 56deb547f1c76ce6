"""Predictions beside references, against `generate` of the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.errors import ConfigError
from accessory.eval.predict import predictions
from accessory.meta import MetaModel, Sampling

RECORDS = [
    {"instruction": "What is it?", "output": "A harness."},
    {"instruction": "Name one.", "input": "of these", "output": "The first one."},
    {"instruction": "Why?", "output": "Because."},
]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> MetaModel:
    """Untrained: it answers something."""
    return MetaModel.from_pretrained(tiny_base, dtype="fp32", max_seq_len=400)


def test_predictions_are_what_is_generated(model: MetaModel, tmp_path: Path) -> None:
    """Of the prompt as training lays it out; the reference is the answer without what ends it."""
    data = tmp_path / "val.json"
    data.write_text(json.dumps(RECORDS))
    how = Sampling.of(max_gen_len=6, temperature=0.0)
    found = list(predictions(model, data, how=how))
    asked = [model.question(each["instruction"], each.get("input", "")) for each in RECORDS]
    assert [each["prompt"] for each in found] == asked
    assert [each["reference"] for each in found] == [each["output"] for each in RECORDS]
    assert [each["prediction"] for each in found] == model.generate(asked, max_gen_len=6, temperature=0.0)
    assert list(predictions(model, data, limit=2, how=how)) == found[:2]
    with pytest.raises(ConfigError, match="limit is 0"):
        next(predictions(model, data, limit=0))


def test_the_last_answer_of_a_conversation_is_asked_for(model: MetaModel, tmp_path: Path) -> None:
    """What came before stands in the prompt."""
    data = tmp_path / "talk.json"
    turns = [("human", "One?"), ("gpt", "Two."), ("human", "Three?"), ("gpt", "Four.")]
    data.write_text(json.dumps([{"conversations": [{"from": who, "value": said} for who, said in turns]}]))
    (found,) = predictions(model, data, dialog=True, how=Sampling.of(max_gen_len=3, temperature=0.0))
    assert found["reference"].strip().startswith("Four.") and "Two." in found["prompt"]
    assert "Four." not in found["prompt"]
