"""MMLU's lines against each letter's likelihood."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accessory.errors import DataError
from accessory.eval.mmlu import LETTERS, Item, mmlu, read_mmlu
from accessory.meta import MetaModel

QUESTION = "The following are multiple choice questions.\n\n{} is?\nA. x\nB. y\nC. z\nD. w\nAnswer:"


def test_accuracy_is_of_subjects_that_count_alike(model: MetaModel, tmp_path: Path) -> None:
    """The answer is the letter with the highest log p; rows may be in any order."""
    path, wanted = tmp_path / "five_shot_mmlu_val.json", {}
    rows = [{"subject": ("law", "art", "law")[i % 3], "input": QUESTION.format(i), "output": LETTERS[i % 4]}
            for i in range(9)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        ids = [model.tokenizer.bos_id, *model.tokenizer.encode(row["input"])]
        whole = [[model.tokenizer.bos_id, *model.tokenizer.encode(f"{row['input']} {letter}")] for letter in LETTERS]
        scores = []
        for text in whole:
            logits = model.logits(torch.tensor(text), (len(text),)).double().log_softmax(1)
            scores.append(sum(logits[i - 1, text[i]].item() for i in range(len(ids), len(text))))
        right, loss = scores.index(max(scores)) == LETTERS.index(row["output"]), -scores[LETTERS.index(row["output"])]
        wanted.setdefault(row["subject"], []).append((right, loss))
    found = mmlu(model, read_mmlu(path))
    means = {subject: sum(right for right, _ in pairs) / len(pairs) for subject, pairs in wanted.items()}
    assert {subject: figure.value for subject, figure in found.subjects.items()} == pytest.approx(means)
    assert found.accuracy.value == pytest.approx(sum(means.values()) / 2)
    losses = [loss for pairs in wanted.values() for _, loss in pairs]
    assert found.loss.value == pytest.approx(sum(losses) / 9, rel=1e-4)
    assert found.documents == 9


def test_what_is_no_question(tmp_path: Path) -> None:
    path = tmp_path / "mmlu.json"
    path.write_text('{"subject": "law", "input": "?", "output": "A"}\n{"input": "?", "output": "E"}\n')
    with pytest.raises(DataError, match=r"mmlu.json:2: has \['input', 'output'\] and the output 'E'; expected subject"):
        read_mmlu(path)
    rows = [
        {"subject": subject, "input": str(i), "output": "A"} for i, subject in enumerate(("law", "law", "law", "art"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_mmlu(path, 3) == [Item("law", "0", "A"), Item("art", "3", "A"), Item("law", "1", "A")]
