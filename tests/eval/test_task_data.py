"""Published files of tasks to the rows that the harness's tasks read."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.errors import DataError
from accessory.eval.task_data import TaskData
from tests.eval.published import arc, boolq, piqa, wic, winogrande, write_published

pytest.importorskip("datasets", reason="the extra eval is not installed")


@pytest.fixture
def data(tmp_path: Path) -> TaskData:
    """All published files."""
    return TaskData(write_published(tmp_path))


def test_each_is_known_and_laid_out(data: TaskData) -> None:
    """By its fields and its path, under the names by which the harness asks."""
    assert data.load("baber/piqa")["validation"][3] == {**piqa(3), "label": 1}
    rows = data.load("allenai/ai2_arc", "ARC-Easy")["test"]
    stem, choices = arc(4)["question"]["stem"], arc(4)["question"]["choices"]
    assert (rows[4]["question"], rows[4]["answerKey"]) == (stem, arc(4)["answerKey"])
    assert rows[4]["choices"] == {key: [choice[key] for choice in choices] for key in ("text", "label")}
    assert data.load("allenai/ai2_arc", "ARC-Challenge")["test"][0]["question"] == arc(20)["question"]["stem"]
    assert data.load("aps/super_glue", "boolq")["validation"][0] == {**boolq(0), "label": 0}
    assert data.load("aps/super_glue", "wic")["validation"][0] == {**wic(0), "label": 1}
    found = data.load("allenai/winogrande", "winogrande_xl")["validation"][1]
    assert found == {key: winogrande(1)[key] for key in found} and found["answer"] == "2"
    mmlu = data.load("cais/mmlu", "anatomy")
    assert (mmlu["test"][2]["answer"], len(mmlu["test"][2]["choices"]), len(mmlu["dev"])) == (2, 4, 5)
    assert mmlu["test"][0]["question"].endswith(", test?")


def test_the_original_boolq_answers_otherwise(tmp_path: Path) -> None:
    """Before SuperGLUE its answers were called so."""
    (tmp_path / "dev.jsonl").write_text('{"question": "is it", "title": "T", "answer": true, "passage": "P"}\n')
    assert TaskData(tmp_path).load("aps/super_glue", "boolq")["validation"][0]["label"] == 1


@pytest.mark.parametrize(("answer", "label"), [("true", 1), ("false", 0)])
def test_answers_may_be_in_quotes(tmp_path: Path, answer: str, label: int) -> None:
    """As in OpenCompass's copies of SuperGLUE."""
    (tmp_path / "val.jsonl").write_text(f'{{"question": "is it", "passage": "P", "idx": 0, "label": "{answer}"}}\n')
    assert TaskData(tmp_path).load("aps/super_glue", "boolq")["validation"][0]["label"] == label


def test_examples_may_be_missing_questions_not(data: TaskData) -> None:
    """A task asks for its training file even where it shows no examples."""
    assert len(data.load("baber/piqa")["train"]) == 0
    with pytest.raises(DataError, match=r"piqa lacks its test file; found validation \(valid.jsonl\)"):
        data.load("baber/piqa")["test"]


def test_what_is_not_there(data: TaskData, tmp_path: Path) -> None:
    """What was found is named, and what to do."""
    said = r"holds no data of Rowan/hellaswag; found arc_challenge, arc_easy, boolq, .*hf download Rowan/hellaswag"
    with pytest.raises(DataError, match=said):
        data.load("Rowan/hellaswag")
    with pytest.raises(DataError, match="is no directory"):
        TaskData(tmp_path / "nowhere")


def test_bad_records_are_named(tmp_path: Path) -> None:
    """With file and line."""
    path = tmp_path / "valid.jsonl"
    path.write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n\n{"goal": "h", "sol1": "a"}\n')
    with pytest.raises(
        DataError,
        match=r"valid.jsonl:1: is no record of piqa: lacks 'label'; answers are expected in it, or in valid-labels",
    ):
        TaskData(tmp_path).load("baber/piqa")["validation"]
    path.write_text('{"goal": "g", "sol1": "a", "sol2": "b"}\n' * 3)
    for count in (0, 2, 4):
        (tmp_path / "valid-labels.lst").write_text("0\n" * count)
        with pytest.raises(
            DataError, match=rf"valid-labels.lst: holds {count} labels for the 3 documents of valid.jsonl; expected one"
        ):
            TaskData(tmp_path).load("baber/piqa")["validation"]
    (tmp_path / "a_test.csv").write_text("q,1,2,3,4,E\n")
    with pytest.raises(DataError, match=r"a_test.csv:1: .*expected a question, 4 choices and A, B, C or D"):
        TaskData(tmp_path).load("cais/mmlu", "a")["test"]
