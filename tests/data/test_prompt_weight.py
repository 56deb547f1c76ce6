"""Prompts that weigh something in the loss: labels, weights, shared beginnings, and their sums."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from accessory.data.batch import IGNORE, Document, PackedBatch
from accessory.data.corpus import Corpus
from accessory.data.order import GlobalOrder

WEIGHT = 0.25


def document(tokens: list[int], answer: int, number: int = 0) -> Document:
    """The last `answer` labels weigh 1, the others a quarter."""
    ids = np.array(tokens, np.int32)
    weights = np.full(len(ids), WEIGHT, np.float32)
    weights[len(ids) - 1 - answer :] = 1
    weights[-1] = 0
    return Document(ids, np.append(ids[1:], IGNORE).astype(np.int64), number, weights=weights)


def test_weights_of_shared_tokens_are_summed() -> None:
    """1 and 2 stand for three documents and 3 for two; what predicts another token stands alone, answers too."""
    made = [document([1, 2, 3, 4, 9], 2, 7), document([1, 2, 3, 6, 6], 1, 8), document([1, 2, 5, 5], 1, 9)]
    packed = PackedBatch.pack(made)
    assert packed.shared == (0, 2, 1) and packed.tokens.tolist() == [1, 2, 3, 4, 9, 3, 6, 6, 2, 5, 5]
    assert packed.labels.tolist() == [2, 3, 4, 9, IGNORE, 6, 6, IGNORE, 5, 5, IGNORE]
    assert packed.weights.tolist() == [0.75, 0.5, 1, 1, 0, 0.25, 1, 0, 0.25, 1, 0]
    assert torch.equal(packed.to("cpu").weights, packed.weights)


def test_equal_documents_keep_a_token_each() -> None:
    """And their answers share their losses."""
    packed = PackedBatch.pack([document([1, 2, 3, 4], 2, i) for i in range(3)])
    assert packed.shared == (0, 3, 3) and packed.tokens.tolist() == [1, 2, 3, 4, 4, 4]
    assert packed.weights.tolist() == [0.75, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("weight", [0.0, WEIGHT, 1.0])
def test_order_weighs_prompts(corpus_of: Callable[[list[int]], Corpus], share: bool, weight: float) -> None:
    """Each label of each document, shared or not, adds its weight to what the loss is divided by."""
    corpus = corpus_of([5, 9, 2, 7])
    order = GlobalOrder(corpus, batch_size=4, accum_iter=1, share_prefixes=share, prompt_weight=weight)
    (batch,) = order.micro_batches(0, 0)
    learned = int(corpus.supervised.sum())
    wanted = learned + weight * (int(corpus.lengths.sum()) - 4 - learned)
    assert order.loss_weight(0, 0) == pytest.approx(wanted)
    assert order.supervised_tokens(0, 0) == learned
    if not weight:
        assert batch.weights is None and batch.supervised == learned and type(order.loss_weight(0, 0)) is int
        return
    assert float(batch.weights.sum()) == pytest.approx(wanted)
    assert not batch.weights[batch.labels < 0].any()
    assert any(batch.shared) == share
