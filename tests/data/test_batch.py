import dataclasses

import numpy as np
import pytest
import torch

from accessory.data.batch import IGNORE, Inset, PackedBatch


@pytest.fixture
def batch():
    first = (np.array([5, 6, 7], np.int32), np.array([IGNORE, 7, IGNORE]), 4)
    second = (np.array([8, 9], np.int32), np.array([0, IGNORE]), np.int64(1))
    return PackedBatch.pack([first, second])


def test_documents_lie_end_to_end_in_the_order_given(batch):
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9]
    assert batch.labels.tolist() == [IGNORE, 7, IGNORE, 0, IGNORE]
    assert (batch.lengths, batch.sample_ids) == ((3, 2), (4, 1))
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64


def test_token_zero_is_a_label_like_any_other(batch):
    assert batch.supervised == 2


def test_idle_is_one_token_with_nothing_to_learn():
    idle = PackedBatch.idle(9)
    assert (idle.tokens.tolist(), idle.labels.tolist(), idle.lengths) == ([9], [IGNORE], (1,))
    assert (idle.sample_ids, idle.shared) == ((), (0,))
    assert idle.supervised == 0 and idle.tokens.dtype == torch.int64


def test_moving_keeps_everything(batch):
    moved = batch.to("meta", non_blocking=True)
    assert moved.tokens.device.type == moved.labels.device.type == moved.rows.device.type == "meta"
    assert moved.labelled is moved.rows and len(moved.rows) == batch.supervised
    assert batch.rows is None and torch.equal(batch.labelled, (batch.labels >= 0).nonzero()[:, 0])
    assert (moved.lengths, moved.sample_ids) == (batch.lengths, batch.sample_ids)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only memory for a GPU can be pinned")
def test_pinned_it_is_the_same_batch(batch):
    pinned = batch.pin_memory()
    assert pinned.tokens.is_pinned() and pinned.labels.is_pinned()
    assert torch.equal(pinned.tokens, batch.tokens) and torch.equal(pinned.labels, batch.labels)
    assert (pinned.lengths, pinned.sample_ids, pinned.shared) == (batch.lengths, batch.sample_ids, batch.shared)


def test_a_batch_does_not_change(batch):
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.lengths = (5,)


def document(tokens, supervised, number=0):
    """`supervised`: how many labels at the end count."""
    tokens = np.array(tokens, np.int32)
    labels = np.append(tokens[1:], IGNORE).astype(np.int64)
    labels[: len(tokens) - 1 - supervised] = IGNORE
    return tokens, labels, number


def test_what_documents_begin_alike_with_is_packed_once():
    """Sorted, up to the first label: the 4 of two documents stands twice, for what comes next is learned there."""
    packed = PackedBatch.pack(
        [document([1, 2, 3, 4, 9, 9], 2, 7), document([1, 2, 5, 5], 1, 8), document([1, 2, 3, 4, 6, 6, 6], 3, 9)]
    )
    assert packed.tokens.tolist() == [1, 2, 3, 4, 6, 6, 6, 4, 9, 9, 5, 5]
    assert packed.labels.tolist() == [IGNORE] * 3 + [6, 6, 6, IGNORE] + [9, 9, IGNORE] + [5, IGNORE]
    assert (packed.lengths, packed.shared, packed.sample_ids) == ((7, 6, 4), (0, 3, 2), (9, 7, 8))


def test_tokens_with_a_label_are_nobody_elses():
    """Even where the label is the same: it counts for each document. Token 3 of the second predicts what is learned."""
    same = [document([1, 2, 3, 4, 5], 2, i) for i in range(3)]
    packed = PackedBatch.pack(same)
    assert packed.shared == (0, 2, 2) and packed.supervised == 6
    learned = [document([1, 2, 3, 4, 5], 4, i) for i in range(3)]
    assert PackedBatch.pack(learned).shared == (0, 0, 0)
    zero = [document([1, 2, 0, 5], 2, i) for i in range(2)]
    assert PackedBatch.pack(zero).shared == (0, 1) and PackedBatch.pack(zero).supervised == 4


def test_a_document_that_begins_another_is_shared_whole():
    packed = PackedBatch.pack([document([1, 2, 3, 4], 1, 0), document([1, 2], 0, 1)])
    assert (packed.sample_ids, packed.shared, packed.tokens.tolist()) == ((1, 0), (0, 2), [1, 2, 3, 4])


def test_documents_stay_as_given_where_sharing_is_not_allowed_or_worth_it():
    """Two tokens of 20 are worth it, two of 21 are not."""
    longer, shorter = document([1, 2, *range(20, 30)], 5, 0), [1, 2, *range(3, 9)]
    assert PackedBatch.pack([longer, document(shorter, 3, 1)]).sample_ids == (1, 0)
    given = longer, document([*shorter, 9], 3, 1)
    assert PackedBatch.pack(given).sample_ids == (0, 1)
    assert PackedBatch.pack([longer, document(shorter, 3, 1)], share=False).shared == (0, 0)


def test_shared_tokens_move_along():
    packed = PackedBatch.pack([document([1, 2, 3], 1, i) for i in range(2)])
    assert packed.shared == packed.to("meta").shared == (0, 1)


def test_packing_copies(batch):
    tokens = np.array([1, 2])
    packed = PackedBatch.pack([(tokens, tokens, 0)])
    tokens[0] = 9
    assert packed.tokens.tolist() == [1, 2]


def test_beginnings_end_where_insets_differ():
    """By value or by name; an equal one is laid in once, and one behind it moves up with its tokens."""
    rows = torch.arange(6.0).view(3, 2)
    one, other, same = (Inset(1, 3, held) for held in (rows, rows + 1, rows.clone()))
    packed = PackedBatch.pack(
        [
            (*document([7, 0, 0, 0, 8, 9], 1, 0), (one,)),
            (*document([7, 0, 0, 0, 8, 5], 1, 1), (other,)),
            (*document([7, 0, 0, 0, 8, 6, 0, 0, 4], 1, 2), (same, Inset(6, 2, "a.png"))),
        ]
    )
    assert sorted(packed.shared) == [0, 1, 4] and len(packed.tokens) == 16
    assert sorted(inset.rows for inset in packed.insets) == [2, 3, 3]
    assert all(packed.tokens[i.start : i.start + i.rows].eq(0).all() for i in packed.insets)
    assert [i.start for i in packed.to("meta").insets] == [i.start for i in packed.insets]
    named = [(*document([7, 0, 0, 8, 9], 1, i), (Inset(1, 2, name),)) for i, name in enumerate("aab")]
    assert sorted(PackedBatch.pack(named).shared) == [0, 1, 3]
