"""Perplexity of windows against float64 over whole logits."""

from __future__ import annotations

import math

import pytest
import torch

from accessory.errors import DataError
from accessory.eval.perplexity import perplexity
from accessory.meta import MetaModel
from tests.conftest import DATA

TEXT = DATA.read_text()[:2000]


@pytest.mark.parametrize("windows", [None, 3, 1])
def test_of_windows(model: MetaModel, windows: int | None) -> None:
    """Each read by itself, its first token not predicted, the ragged end dropped; the error is that of their mean."""
    ids = torch.tensor([model.tokenizer.bos_id, *model.tokenizer.encode(TEXT)])
    means = []
    for part in ids[: len(ids) // 50 * 50].split(50)[:windows]:
        scores = model.logits(part, (50,)).double().log_softmax(1)[:-1]
        means.append(-scores.gather(1, part[1:, None]).mean().item())
    found, count = perplexity(model, TEXT, 50, windows), len(means)
    mean = sum(means) / count
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    assert (found.windows, found.tokens) == (count, 49 * count)
    if windows == 1:
        assert math.isnan(found.stderr)
        return
    deviation = math.sqrt(sum((each - mean) ** 2 for each in means) / (count - 1) / count)
    assert found.stderr == pytest.approx(math.exp(mean) * deviation, rel=1e-4)


@pytest.mark.parametrize(("seq", "windows", "said"), [
    (200, None, r"A window of 200 tokens cannot be read; expected 2 to 128"),
    (100, 99, r"The text has \d+ tokens, \d+ windows of 100; expected 99 or more"),
])  # fmt: skip
def test_what_cannot_be(model: MetaModel, seq: int, windows: int | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        perplexity(model, TEXT, seq, windows)
