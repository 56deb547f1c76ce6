"""accessory/quantizer/calibration.py: whose text, cut into rows of which length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accessory.errors import DataError
from accessory.quantizer.calibration import calibration_rows
from accessory.tokenizer import open_tokenizer


@pytest.fixture
def records(tmp_path: Path, strings: list[str]) -> Path:
    """Records of several texts, one of them empty, and of turns."""
    path = tmp_path / "records.json"
    records = [{"instruction": text, "input": "", "output": "yes", "n": 3} for text in strings]
    records.append({"conversations": [{"from": "human", "value": "who"}, {"from": "gpt", "value": "me"}]})
    path.write_text(json.dumps(records))
    return path


def test_rows_are_pieces_of_the_text(tiny_base: Path, records: Path, strings: list[str]) -> None:
    """Rows begin as the tokenizer's texts do; all of them are what the records say, but for what is left over."""
    tokenizer = open_tokenizer(tiny_base)
    texts = [f"{text}\nyes" if text.strip() else "yes" for text in strings] + ["human\nwho\ngpt\nme"]
    whole = [token for text in texts for token in tokenizer.encode(f"{text}\n\n")]
    start, taken = list(tokenizer.start_ids), 24 - len(tokenizer.start_ids)
    count = len(whole) // taken
    rows = calibration_rows(records, tokenizer, 24, count)
    expected = {tuple(start + whole[i * taken : (i + 1) * taken]) for i in range(count)}
    assert rows.shape == (count, 24) and rows.dtype == torch.int64
    assert {tuple(row) for row in rows.tolist()} == expected
    few = calibration_rows(records, tokenizer, 24, 3, seed=1)
    assert {tuple(row) for row in few.tolist()} < expected
    assert not torch.equal(few, calibration_rows(records, tokenizer, 24, 3, seed=2))


def test_too_little_text(tiny_base: Path, records: Path) -> None:
    """How much there is, and what to do."""
    with pytest.raises(
        DataError, match=r"rows of 24; expected text for 99999 rows\. Give more text, or smaller --rows"
    ):
        calibration_rows(records, open_tokenizer(tiny_base), 24, 99999)


def test_a_broken_record(tiny_base: Path, tmp_path: Path) -> None:
    """It is not left out silently: its line is named."""
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(DataError, match=r"records\.jsonl, line 2"):
        calibration_rows(path, open_tokenizer(tiny_base), 24, 1)
