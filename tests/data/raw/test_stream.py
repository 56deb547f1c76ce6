"""Streams give every document of a pass once, and go on from any position as if they had not stopped."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from accessory.data.raw import encoding
from accessory.data.raw.documents import TextReader
from accessory.data.raw.plan import TextPlan, plan_text
from accessory.data.raw.skipped import Skipped
from accessory.data.raw.stream import Position, Stream
from accessory.errors import DataError
from tests.data.raw.texts import as_file, made, written

STREAMS = 3


@pytest.fixture
def plan(tmp_path: Path, tokenizer) -> TextPlan:
    """Of two files, 150 documents."""
    files = [written(tmp_path / f"{n}.jsonl", made(75, n)) for n in range(2)]
    return plan_text(files, TextReader(), tokenizer, STREAMS, seed=5)


def stream(plan: TextPlan, tokenizer, number: int, most: float = 0.0, tell=print) -> Stream:
    return Stream(plan, tokenizer, number, STREAMS, 2000, Skipped(most, tell))


def texts_in(tokens: np.ndarray) -> list[str]:
    """Documents of a row of tokens, of which each begins with 1, 259 and ends with 2; the last may be cut."""
    cut = np.split(tokens, np.flatnonzero(tokens == 1))
    return [bytes(t - 3 for t in part[2:-1].tolist()).decode() for part in cut if len(part) and part[-1] == 2]


def test_a_pass_gives_every_document_once(plan: TextPlan, tokenizer) -> None:
    """Blocks 0 to N - 1 of the endless sequence are one pass, whichever stream has them; then the next one begins."""
    assert len(plan.blocks) > 3 * STREAMS
    for done in range(2):
        blocks = [plan.block(done * len(plan.blocks) + place) for place in range(len(plan.blocks))]
        assert len({(block.file.path, block.start) for block in blocks}) == len(blocks)
    orders = [[plan.block(done * len(plan.blocks) + place)[1:] for place in range(len(plan.blocks))] for done in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    seen: Counter[str] = Counter()
    for number in range(STREAMS):
        own = stream(plan, tokenizer, number)
        parts = []
        while own.position.block < len(plan.blocks):
            parts.append(own.take(100).tokens[:-1])
        seen.update(texts_in(np.concatenate(parts)))
    expected = set(made(75, 0) + made(75, 1))
    assert seen.keys() == expected
    assert sum(seen.values()) - len(expected) < 40  # a window of the next pass may have been begun
    assert [*seen][:20] != (made(75, 0) + made(75, 1))[:20]


def test_a_window_ends_where_a_pass_does(plan: TextPlan, tokenizer) -> None:
    """However large it may be: no document comes again before all others came."""
    own = Stream(plan, tokenizer, 0, 1, 1 << 30, Skipped(0, print))
    tokens = own.take(plan.tokens * 3).tokens
    texts = texts_in(tokens)
    for first in (0, 150):
        assert len(set(texts[first : first + 150])) == 150
    assert texts[:150] != texts[150:300]


@pytest.mark.parametrize("taken", [0, 1, 7, 30])
def test_a_stream_goes_on_where_it_stood(plan: TextPlan, tokenizer, taken: int, monkeypatch) -> None:
    """Where documents are encoded in parts, too."""
    monkeypatch.setattr(encoding, "PART", 200)
    whole, other = stream(plan, tokenizer, 1), stream(plan, tokenizer, 1)
    for _ in range(taken):
        whole.take(333)
    position = Position(*map(int, whole.position))
    other.go_to(position)
    for _ in range(20):
        one, two = whole.take(333), other.take(333)
        assert np.array_equal(one.tokens, two.tokens) and one.origin == two.origin
        assert np.array_equal(one.starts[1:], two.starts[1:])
    assert whole.position == other.position


def test_rows_overlap_in_the_token_that_is_only_predicted(plan: TextPlan, tokenizer) -> None:
    own = stream(plan, tokenizer, 0)
    rows = [own.take(50) for _ in range(9)]
    assert all(before.tokens[-1] == after.tokens[0] for before, after in pairwise(rows))
    whole = stream(plan, tokenizer, 0).take(450)
    assert np.array_equal(np.concatenate([row.tokens[:-1] for row in rows]), whole.tokens[:-1])
    assert np.array_equal(np.flatnonzero(whole.tokens == 1)[1:], np.flatnonzero(whole.starts)[1:])


def test_tokens_are_estimated(plan: TextPlan, tokenizer) -> None:
    true = sum(len(tokenizer.encode(text)) + 2 for text in made(75, 0) + made(75, 1))
    assert plan.tokens == pytest.approx(true, rel=0.1)


def test_files_without_text_say_why(tmp_path: Path, tokenizer) -> None:
    files = [written(tmp_path / "a.jsonl", made(9), key="body")]
    with pytest.raises(
        DataError, match=r"a sample of it: .*a\.jsonl:1: has no text under .*found 'n', 'body' \(--text_k"
    ):
        plan_text(files, TextReader(), tokenizer, 1, 0)
    with pytest.raises(DataError, match=r"a\.txt: no text was found in a sample of it\."):
        plan_text([written(tmp_path / "a.txt", [" "])], TextReader(unit="lines"), tokenizer, 1, 0)


def test_documents_that_cannot_be_used_are_named_and_too_many_end_it(tmp_path: Path, tokenizer) -> None:
    file = written(tmp_path / "a.jsonl", made(40))
    lines = file.path.read_text().splitlines()
    lines[20:22] = ["{", '{"other": 1}']
    file.path.write_text("\n".join(lines))
    file = as_file(file.path)
    plan, told = plan_text([file], TextReader(), tokenizer, 1, 0), []
    own = stream(plan, tokenizer, 0, 0.1, told.append)
    while own.position.block < len(plan.blocks):
        own.take(100)
    assert any(line.startswith(f"{file.path}:21: is not valid JSON") for line in told), told
    assert any(f"{file.path}:22: has no text under 'content' or 'text'; found 'other'" in line for line in told)
    with pytest.raises(DataError, match=r"a\.jsonl:2[12]: .* --max_skipped 0 allows no more"):
        strict = stream(plan, tokenizer, 0)
        while strict.position.block < len(plan.blocks):
            strict.take(100)
    file.path.write_text("gone")
    with pytest.raises(DataError, match=r"a\.jsonl: has 4 bytes; it had [\d,]+ when the run looked at it first"):
        stream(plan, tokenizer, 0).take(10)
