"""Rows of the validation file are its documents, joined, and what cannot be used is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from accessory.data.raw.documents import TextReader
from accessory.data.raw.held_out import corpus_of, text_rows
from accessory.data.raw.skipped import Skipped
from accessory.errors import DataError
from tests.data.raw.texts import as_file, made, written


def test_rows_are_joined_documents(tmp_path: Path, tokenizer) -> None:
    documents, told = made(30), []
    file = written(tmp_path / "a.jsonl", documents)
    file.path.write_text(file.path.read_text() + '{"content": 3}\n')
    file = as_file(file.path)
    rows = [*text_rows(file, TextReader(), tokenizer, 64, None, Skipped(0.1, told.append))]
    expected = [token for text in documents for token in [1, *tokenizer.encode(text), 2]]
    assert np.concatenate([rows[0].tokens[:1], *(row.tokens[1:] for row in rows)]).tolist() == expected
    (said,) = told
    assert said.startswith(f"{file.path}:31: has no text under 'content'") and said.endswith("it is left out")
    first = [*text_rows(file, TextReader(), tokenizer, 64, 3, Skipped(0.1, told.append))]
    assert [row.tokens.tolist() for row in first] == [row.tokens.tolist() for row in rows[:3]]
    for across in (True, False):
        corpus = corpus_of(iter(first), file, tokenizer, across, {})
        assert corpus.lengths.sum() == 3 * 64 - (0 if across else held_alone(first))
    with pytest.raises(DataError, match=r"a\.jsonl:1: has no text under 'body'.* --max_skipped 0 allows no more"):
        next(text_rows(file, TextReader("body"), tokenizer, 64, None, Skipped(0, told.append)))


def held_alone(rows: list) -> int:
    """Documents of one token within rows, which predict nothing."""
    cuts = [np.flatnonzero([True, *row.starts[1:-1], True]) for row in rows]
    return sum(int((np.diff(each) == 1).sum()) for each in cuts)
