"""Predictions beside references, against `generate` of the same questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.data.templates import CHAT, DIALOG
from accessory.errors import ConfigError, TokenizerError
from accessory.eval.predict import predictions, questions
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
    corpus = questions(model, data)
    found = list(predictions(model, corpus, how=how))
    asked = [model.question(each["instruction"], each.get("input", "")) for each in RECORDS]
    assert [each["prompt"] for each in found] == asked
    assert [each["reference"] for each in found] == [each["output"] for each in RECORDS]
    assert [each["prediction"] for each in found] == model.generate(asked, max_gen_len=6, temperature=0.0)
    assert list(predictions(model, corpus, limit=2, how=how)) == found[:2]
    with pytest.raises(ConfigError, match="limit is 0"):
        next(predictions(model, corpus, limit=0))


def test_the_last_answer_of_a_conversation_is_asked_for(model: MetaModel, tmp_path: Path) -> None:
    """What came before stands in the prompt."""
    data = tmp_path / "talk.json"
    turns = [("human", "One?"), ("gpt", "Two."), ("human", "Three?"), ("gpt", "Four.")]
    data.write_text(json.dumps([{"conversations": [{"from": who, "value": said} for who, said in turns]}]))
    (found,) = predictions(model, questions(model, data), how=Sampling.of(max_gen_len=3, temperature=0.0))
    assert found["reference"] == "Four." and "Two." in found["prompt"]
    assert "Four." not in found["prompt"]


def test_a_text_that_ends_an_answer(model: MetaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout dialog it is `###`, which no vocabulary has a token for; what stands before it is the answer."""
    said = model.tokenizer.encode(" Four.\n### Human: Five?\n###")
    monkeypatch.setattr(model, "steps", lambda *_, stopped, **__: (
        [None if number in stopped() else token for number in range(2)] for token in said))  # fmt: skip
    data = tmp_path / "val.json"
    data.write_text(json.dumps([RECORDS[0], RECORDS[2]]))
    found = list(predictions(model, questions(model, data, DIALOG)))
    assert [each["prediction"] for each in found] == ["Four."] * 2
    assert [each["reference"] for each in found] == ["A harness.", "Because."]
    assert found[0]["prompt"].endswith("### Human: What is it?\n### Assistant:")


@pytest.mark.parametrize(
    ("trained", "stated", "entry", "expected"),
    [
        ((DIALOG,), None, {}, DIALOG),
        ((DIALOG,), None, {"prompt_type": "alpaca"}, DIALOG),
        ((DIALOG, "alpaca"), None, {}, "alpaca"),
        ((DIALOG, "none"), None, {"prompt_type": "none"}, "none"),
        (("none",), DIALOG, {"prompt_type": "alpaca"}, DIALOG),
        ((), None, {}, "alpaca"),
        ((), None, {"prompt_type": "none"}, "none"),
    ],
)
def test_the_layout_of_training_is_followed(
    model: MetaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained, stated, entry, expected
) -> None:
    """Before that of the data; what the user states comes first. Words of the system stand before a question."""
    (tmp_path / "val.json").write_text(json.dumps(RECORDS))
    (tmp_path / "val.yaml").write_text(json.dumps({"META": [{"path": "val.json", **entry}]}))
    monkeypatch.setattr(model, "prompt_layouts", trained)
    monkeypatch.setattr(model, "system", "Be brief." if DIALOG in trained else None)
    corpus = questions(model, tmp_path / "val.yaml", stated)
    asked = model.question(RECORDS[0]["instruction"], prompt_layout=expected)
    prompt = model.prompt_tokens(asked)
    assert corpus.tokens[: len(prompt)].tolist() == prompt and not corpus.learned[: len(prompt)].any()
    unused = bool(entry) and entry["prompt_type"] != expected
    assert ("is not used: questions are laid out as" in corpus.report) == unused


def test_layouts_that_cannot_be(model: MetaModel, tmp_path: Path) -> None:
    (tmp_path / "val.json").write_text(json.dumps(RECORDS))
    with pytest.raises(ConfigError, match=r"prompt layout 'dialgo' is unknown\. Did you mean 'dialog'"):
        questions(model, tmp_path / "val.json", "dialgo")
    with pytest.raises(TokenizerError, match="no chat template"):
        questions(model, tmp_path / "val.json", CHAT)
