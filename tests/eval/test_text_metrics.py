"""ROUGE and BLEU against counts by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from accessory.errors import ConfigError, DataError
from accessory.eval.text_metrics import Pair, read_pairs, text_figures

pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
pytest.importorskip("rouge_chinese", reason="the extra eval is not installed")

ENGLISH = [Pair("the cat sat on the mat", "The cat lay on the mat."), Pair("yes", "no no"), Pair("", "empty")]
CHINESE = [Pair("今天天气很好", "今天天气非常好"), Pair("我喜欢学习", "我喜欢学习")]


def overlap(one: list[str], other: list[str], n: int) -> float:
    """F of the n-grams that both have."""
    grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (one, other)]
    common = (grams[0] & grams[1]).total()
    return 2 * common / max(grams[0].total() + grams[1].total(), 1)


@pytest.mark.slow
def test_rouge_of_english() -> None:
    """Lower-case words without punctuation; means over documents with their errors."""
    words = [
        (["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "lay", "on", "the", "mat"]),
        (["yes"], ["no", "no"]),
        ([], ["empty"]),
    ]
    found = text_figures(ENGLISH)
    for n in (1, 2):
        each = [100 * overlap(*pair, n) for pair in words]
        assert found[f"rouge-{n}"].value == pytest.approx(sum(each) / 3)
        middle = sum(each) / 3
        assert found[f"rouge-{n}"].stderr == pytest.approx(math.sqrt(sum((e - middle) ** 2 for e in each) / 2 / 3))
    assert found["rouge-l"].value == pytest.approx(100 * (5 / 6) / 3)  # five of six words, in order


def test_bleu() -> None:
    """Of one document: the geometric mean of four precisions, times the brevity penalty; characters in Chinese."""
    found = text_figures([Pair("a b c d e f", "a b c d e g h")])
    precisions = [5 / 6, 4 / 5, 3 / 4, 2 / 3]
    wanted = 100 * math.prod(precisions) ** 0.25 * math.exp(1 - 7 / 6)
    assert found["bleu-4"].value == pytest.approx(wanted) == found["bleu-4-corpus"].value
    assert found["bleu-4-corpus"].stderr == pytest.approx(0)
    chinese = text_figures(CHINESE)
    precisions = [(5 + 5) / (6 + 5), (3 + 4) / (5 + 4), (2 + 3) / (4 + 3), (1 + 2) / (3 + 2)]
    assert chinese["bleu-4-corpus"].value == pytest.approx(100 * math.prod(precisions) ** 0.25 * math.exp(1 - 12 / 11))
    assert chinese["bleu-4-corpus"].stderr > 0


def test_rouge_of_chinese() -> None:
    """Over words, told from the references or said."""
    assert text_figures(CHINESE) == text_figures(CHINESE, "zh") != text_figures(CHINESE, "en")
    (alike,) = {round(figure.value) for name, figure in text_figures(CHINESE[1:]).items() if name.startswith("rouge")}
    assert alike == 100
    assert 0 < text_figures(CHINESE)["rouge-1"].value < 100


def test_files_of_predictions(tmp_path: Path) -> None:
    """As qlora writes them, and as transformers' examples do."""
    path = tmp_path / "predictions.jsonl"
    rows = [{"input": "q", "output": "a", "prediction": "b"}, {"label": "c", "predict": "d"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_pairs(path) == [Pair("b", "a"), Pair("d", "c")]
    path.write_text('{"text": "x"}\n')
    with pytest.raises(
        DataError, match=r"predictions.jsonl:1: has the keys \['text'\]; expected a text in one of predi"
    ):
        read_pairs(path)
    with pytest.raises(ConfigError, match="--language 'de' is unknown"):
        text_figures(ENGLISH, "de")
