import dataclasses

import numpy as np
import pytest
import torch

from accessory.data.batch import IGNORE, PackedBatch


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
    assert idle.supervised == 0 and idle.tokens.dtype == torch.int64


def test_moving_keeps_everything(batch):
    moved = batch.to("meta", non_blocking=True)
    assert moved.tokens.device.type == moved.labels.device.type == "meta"
    assert (moved.lengths, moved.sample_ids) == (batch.lengths, batch.sample_ids)


def test_a_batch_does_not_change(batch):
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.lengths = (5,)


def test_packing_copies(batch):
    tokens = np.array([1, 2])
    packed = PackedBatch.pack([(tokens, tokens, 0)])
    tokens[0] = 9
    assert packed.tokens.tolist() == [1, 2]
