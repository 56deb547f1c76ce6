"""Rows become documents with the right labels, and every split over ranks gives the same rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from accessory.data.batch import IGNORE
from accessory.data.raw.documents import TextReader
from accessory.data.raw.order import Shape, TextOrder, documents_of
from accessory.data.raw.plan import plan_text
from accessory.data.raw.skipped import Skipped
from accessory.data.raw.stream import Row
from accessory.errors import DataError
from tests.data.raw.texts import made, written


def test_labels_stay_inside_documents_or_not() -> None:
    tokens, starts = np.array([7, 2, 1, 8, 2, 1, 9], dtype=np.int32), np.array([0, 0, 1, 0, 0, 1, 0], dtype=bool)
    row = Row(tokens, starts, (None, 0))
    apart = documents_of(row, 3, across=False)
    assert [document.tokens.tolist() for document in apart] == [[7, 2], [1, 8, 2], [1]]
    assert [document.labels.tolist() for document in apart] == [[2, IGNORE], [8, 2, IGNORE], [9]]
    (joined,) = documents_of(row, 3, across=True)
    assert joined.tokens.tolist() == [7, 2, 1, 8, 2, 1] and joined.labels.tolist() == [2, 1, 8, 2, 1, 9]


@pytest.fixture
def order(tmp_path: Path, tokenizer):
    """(rank, ranks, how) -> the order of 12 rows a step on one of so many ranks."""
    files = [written(tmp_path / f"{n}.jsonl", made(60, n)) for n in range(2)]

    def build(rank: int, ranks: int, threads: int = 0, total=lambda values: values, **shape) -> TextOrder:
        plan = plan_text(files, TextReader(), tokenizer, 12, seed=1)
        how = {"window": 3000, "threads": threads, "skipped": Skipped(0, print)}
        return TextOrder(plan, tokenizer, Shape(64, 12 // ranks, 1, rank, ranks, **shape), total, **how)

    return build


def test_ranks_share_the_rows_of_one_process(order) -> None:
    whole = order(0, 1)
    parts = [order(rank, 3, threads=2) for rank in range(3)]
    for step in range(6):
        alone = whole.rows(step)
        for rank, part in enumerate(parts):
            for row, own in zip(part.rows(step), part.shape.own, strict=True):
                assert own % 3 == rank and np.array_equal(row.tokens, alone[own].tokens)
    states = [part.state(0, 6)["streams"] for part in parts]
    assert np.array_equal(sum(states), whole.state(0, 6)["streams"])
    again = order(1, 2)
    again.go_on(0, 6, {"streams": sum(states)})
    for row, own in zip(again.rows(6), again.shape.own, strict=True):
        assert np.array_equal(row.tokens, whole.rows(6)[own].tokens)
    with pytest.raises(DataError, match="streams of shape"):
        again.go_on(0, 6, {})
    assert "0.jsonl:" in whole.where(6 * 12) or "1.jsonl:" in whole.where(6 * 12)


def test_a_fault_in_what_is_read_ahead_prevents_no_save(order) -> None:
    """It is met while the step before is trained, which still can be saved."""
    ordered = order(0, 1, threads=2)
    ordered.rows(0)
    for file in ordered.plan.files:
        file.path.write_text("gone")
    step = 1
    with pytest.raises(DataError, match="when the run looked at it first"):
        while ordered.rows(step):
            saved, step = ordered.state(0, step + 1), step + 1
    assert np.array_equal(ordered.state(0, step)["streams"], saved["streams"])


def test_micro_batches_and_their_labels(order) -> None:
    """With labels of all ranks summed, and a row's labels where tokens attend across documents."""
    apart, joined = order(0, 2, total=lambda values: values * 2), order(0, 2, across=True)
    cut = 0
    for step in range(30):
        (batch,), (other,) = ([*each.micro_batches(0, step)] for each in (apart, joined))
        assert len(batch.tokens) == apart.most_tokens == 6 * 64 and batch.tokens.equal(other.tokens)
        assert apart.supervised_tokens(0, step) == 2 * batch.supervised
        ends = [row.tokens[:-1] == 2 for row in apart.rows(step)]
        assert apart.tokens(0, step) - apart.supervised_tokens(0, step) == 2 * sum(map(sum, ends))
        cut += len(batch.lengths) - 6
        assert joined.loss_weight(0, step) == joined.tokens(0, step) == 12 * 64 == 2 * other.supervised
        assert other.lengths == (64,) * 6
        assert set(batch.sample_ids) == set(apart.documents(0, step).tolist())
    assert cut > 9
    assert [row.tokens.tolist() for row in joined.rows(29)] == [row.tokens.tolist() for row in apart.rows(29)]


def test_a_pass_begun_anew_holds_its_own_blocks(order) -> None:
    """As where the data of a resumed run are other ones: no stream goes back to what an earlier pass gave it."""
    first, later = order(0, 1), order(0, 1)
    later.go_on(2, 0, None)
    assert later._number(2, 0) == 2 * later.steps_per_epoch
    blocks = later.state(2, 0)["streams"][:, 0]
    assert blocks.min() >= 2 * len(later.plan.blocks) and len(set(blocks.tolist())) == 12
    assert [row.tokens.tolist() for row in later.rows(later._next)] != [row.tokens.tolist() for row in first.rows(0)]
