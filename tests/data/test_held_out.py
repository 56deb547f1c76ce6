"""Which documents are held out: fixed by what they say."""

import numpy as np
import pytest

from accessory.data.corpus import build_corpus
from accessory.data.held_out import held_out, in_common
from accessory.data.order import GlobalOrder
from accessory.errors import DataError


def records(*numbers):
    return [{"instruction": f"question {number}", "output": f"answer {number}"} for number in numbers]


def texts(corpus, chosen):
    return {corpus.tokenizer.decode(corpus.document(i)[0].tolist()) for i in np.flatnonzero(chosen)}


@pytest.fixture
def corpus(write, tokenizer):
    """Of records, or of a path."""

    def build(found, **how):
        path = write("data.json", found)
        return build_corpus(path, tokenizer, max_words=512, **how)

    return build


def test_a_record_stays_on_its_side_whatever_is_beside_it(corpus):
    """Among 1,000 about as many as the share says; of half of them in another order, the same ones."""
    whole = corpus(records(*range(1000)))
    chosen = held_out(whole, 0.1)
    assert chosen.dtype == bool and 70 < chosen.sum() < 130
    half = corpus(records(*range(998, 0, -2)))
    again = held_out(half, 0.1)
    assert texts(half, again) == texts(whole, chosen) & texts(half, np.ones(len(half), bool))
    assert texts(whole, held_out(whole, 0.05)) < texts(whole, chosen)


def test_equal_records_and_pieces_of_one_record_are_not_torn_apart(corpus):
    """Else what is validated on would have been trained on."""
    twice = corpus(records(*range(100), *range(100)))
    chosen = held_out(twice, 0.3)
    assert (chosen[:100] == chosen[100:]).all() and chosen.any()
    pieces = corpus(records(*range(50)))
    pieces.origins[1::2] = pieces.origins[::2]  # two documents of each record
    chosen = held_out(pieces, 0.3)
    assert (chosen[::2] == chosen[1::2]).all() and chosen.any()


def test_the_smallest_share_is_told(corpus):
    few = corpus(records(*range(8)))
    with pytest.raises(
        DataError, match=r"--val_split 1e-05 holds out none of the 8 records.*share.* is ([\d.]+)\."
    ) as e:
        held_out(few, 0.00001)
    (least,) = (float(word.rstrip(".")) for word in str(e.value).split() if word.startswith("0."))
    assert held_out(few, least).sum() == 1
    assert least < 0.5
    with pytest.raises(DataError, match=r"--val_split 0\.999 holds out all 8 records and leaves none"):
        held_out(few, 0.999)


def test_records_in_common_are_counted(corpus):
    assert in_common(corpus(records(1, 2, 3, 3)), corpus(records(3, 4, 1))) == 3
    assert in_common(corpus(records(1, 2)), corpus(records(3))) == 0


def test_only_the_documents_that_take_part_are_dealt_out(corpus):
    """On any number of ranks, in every epoch; without a choice the order is what it always was."""
    whole = corpus(records(*range(40)))
    ids = np.flatnonzero(~held_out(whole, 0.3))
    for ranks in (1, 2):
        of_ranks = [GlobalOrder(whole, batch_size=4 // ranks, accum_iter=2, dp_rank=r, dp_size=ranks, ids=ids)
                    for r in range(ranks)]  # fmt: skip
        assert of_ranks[0].steps_per_epoch == -(-len(ids) // 8)
        for epoch in range(2):
            steps = range(of_ranks[0].steps_per_epoch)
            seen = [i for order in of_ranks for step in steps for i in order.documents(epoch, step)]
            assert sorted(seen) == ids.tolist()
    every = GlobalOrder(whole, batch_size=4, accum_iter=2)
    one = GlobalOrder(whole, batch_size=4, accum_iter=2, ids=np.arange(40))
    assert every.global_ids(1, 2).tolist() == one.global_ids(1, 2).tolist()
