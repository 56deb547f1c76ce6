"""Small files of the zero-shot tasks, laid out as their publishers do."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = (
    "the",
    "small",
    "boat",
    "waits",
    "near",
    "a",
    "quiet",
    "harbour",
    "while",
    "two",
    "friends",
    "talk",
    "of",
    "rain",
)


def words(seed: int, count: int) -> str:
    """Some of `WORDS`."""
    return " ".join(WORDS[(seed * 7 + place * (seed % 5 + 1)) % len(WORDS)] for place in range(count))


def piqa(i: int) -> dict:
    """Its answers lie in a file beside."""
    return {"goal": words(i, 6), "sol1": f"{words(i + 1, 3)} slowly", "sol2": f"{words(i + 1, 3)} {words(i + 3, 4)}"}


def arc(i: int) -> dict:
    """Choices are called by letters or digits, and there are three to five."""
    labels = ("ABC", "1234", "ABCDE")[i % 3]
    choices = [{"text": words(i + place, 2), "label": label} for place, label in enumerate(labels)]
    return {"id": f"M_{i}", "question": {"stem": f"{words(i, 7)}?", "choices": choices}, "answerKey": labels[i % 3]}


def boolq(i: int) -> dict:
    """A passage and a question."""
    return {"question": f"is {words(i, 4)}", "passage": words(i, 30), "idx": i, "label": i % 3 > 0}


def winogrande(i: int) -> dict:
    """A sentence with a gap."""
    return {"qID": f"Q{i}", "sentence": f"{words(i, 4)} so _ was {words(i, 3)}.", "option1": "the boat",
            "option2": "an oar", "answer": str(i % 2 + 1)}  # fmt: skip


def wic(i: int) -> dict:
    """A word in two sentences, by its place."""
    one, two = f"boat {words(i, 5)}", f"a boat {words(i + 1, 4)}"
    return {"word": "boat", "sentence1": one, "sentence2": two, "idx": i, "start1": 0, "end1": 4, "start2": 2,
            "end2": 6, "version": 1.1, "label": i % 2 == 0}  # fmt: skip


FILES = {
    "physicaliqa/valid.jsonl": piqa,
    "ARC-V1/ARC-Easy/ARC-Easy-Test.jsonl": arc,
    "ARC-V1/ARC-Challenge/ARC-Challenge-Test.jsonl": lambda i: arc(i + 20),
    "ARC-V1/ARC-Easy/ARC-Easy-Train.jsonl": lambda i: arc(i + 40),
    "BoolQ/val.jsonl": boolq,
    "winogrande_1.1/dev.jsonl": winogrande,
    "WiC/val.jsonl": wic,
}


def write_published(directory: Path, count: int = 5) -> Path:
    """All files, of `count` records each, and two subjects of MMLU."""
    for name, record in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(record(i)) + "\n" for i in range(count)))
    (directory / "physicaliqa" / "valid-labels.lst").write_text("".join(f"{i % 2}\n" for i in range(count)))
    for subject in ("anatomy", "astronomy"):
        for split in ("dev", "test"):
            path = directory / "mmlu" / "data" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            choices = f'{words(1, 1)},"{words(2, 2)}",3,4'
            rows = [f'"{words(i, 5)}, {split}?",{choices},{"ABCD"[i % 4]}' for i in range(5)]
            path.write_text("\n".join(rows) + "\n")
    return directory
