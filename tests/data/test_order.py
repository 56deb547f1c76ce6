import collections
import math

import numpy as np
import pytest

from accessory.data.order import GlobalOrder
from accessory.errors import ConfigError

SIZES = [int(size) for size in np.random.default_rng(3).integers(1, 60, 23)]
LAYOUTS = [(2, 4, 1), (2, 2, 2), (1, 4, 2), (1, 2, 4), (8, 1, 1)]  # (batch_size, accum_iter, ranks), global batch 8


def orders(corpus, layout, **settings):
    batch_size, accum_iter, ranks = layout
    shape = {"batch_size": batch_size, "accum_iter": accum_iter, "dp_size": ranks}
    settings = {"share_prefixes": False} | settings  # documents stand in the order they are dealt in
    return [GlobalOrder(corpus, **shape, dp_rank=rank, **settings) for rank in range(ranks)]


def trained(orders_of_ranks, epoch, step):
    """Ids of the documents all ranks step on."""
    return [
        i for order in orders_of_ranks for batch in order.micro_batches(epoch, step) for i in batch.sample_ids if i >= 0
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_document_once_an_epoch_and_the_same_ones_each_step_on_any_layout(corpus_of, layout, shuffle):
    corpus = corpus_of(SIZES)
    ours, one = orders(corpus, layout, shuffle=shuffle), orders(corpus, (8, 1, 1), shuffle=shuffle)[0]
    assert ours[0].steps_per_epoch == one.steps_per_epoch == 3
    for epoch in range(2):
        seen = []
        for step in range(3):
            ids = trained(ours, epoch, step)
            assert sorted(ids) == sorted(one.global_ids(epoch, step).tolist())
            seen += ids
        assert sorted(seen) == list(range(len(SIZES)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_take_as_many_micro_steps_and_none_is_overfull(corpus_of, layout):
    for documents in (1, 2, 3, 5, 8, 9, 15, 16):
        for shuffle in (True, False):
            ours = orders(corpus_of(SIZES[:documents]), layout, shuffle=shuffle)
            for step in range(ours[0].steps_per_epoch):
                batches = [list(order.micro_batches(0, step)) for order in ours]
                left = min(documents - 8 * step, 8)
                assert {len(own) for own in batches} == {math.ceil(left / (layout[0] * layout[2]))}
                assert max(len(batch.lengths) for own in batches for batch in own) <= layout[0]


def test_epochs_and_seeds_differ_and_repeat(corpus_of):
    corpus = corpus_of(SIZES)

    def order_of(seed, epoch):
        order = orders(corpus, (2, 4, 1), seed=seed)[0]
        return tuple(int(i) for step in range(3) for i in order.global_ids(epoch, step))

    found = [order_of(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(found)) == 6 and order_of(1, 2) == found[-1]
    order = orders(corpus, (2, 4, 1), seed=1)[0]
    order.global_ids(0, 0)
    assert order.global_ids(2, 1).tolist() == list(found[-1][8:16])  # from the middle, after another epoch


def test_the_order_is_that_of_seed_and_epoch_alone(corpus_of):
    order = orders(corpus_of(SIZES), (2, 4, 1), seed=7)[0]
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 3])))
    assert (
        np.concatenate([order.global_ids(3, step) for step in range(3)]).tolist() == generator.permutation(23).tolist()
    )


def test_counts_of_the_global_batch_are_those_of_all_ranks_together(corpus_of):
    ours = orders(corpus_of(SIZES), (1, 2, 4), seed=5)
    for step in range(3):
        batches = [batch for order in ours for batch in order.micro_batches(1, step)]
        real = [batch for batch in batches if batch.supervised]
        for order in ours:
            assert order.supervised_tokens(1, step) == sum(batch.supervised for batch in batches)
            assert order.tokens(1, step) == sum(len(batch.tokens) for batch in real)


def test_what_documents_share_is_packed_once_in_each_micro_batch(corpus_of):
    """On any layout, every document is whole; `packed_tokens` are those of all ranks."""
    corpus = corpus_of(SIZES)
    for layout in LAYOUTS:
        ours = orders(corpus, layout, share_prefixes=True)
        batches = [batch for order in ours for batch in order.micro_batches(0, 1)]
        assert {order.packed_tokens(0, 1) for order in ours} == {sum(len(batch.tokens) for batch in batches)}
        shared = sum(sum(batch.shared) for batch in batches)
        assert sum(len(batch.tokens) for batch in batches) == ours[0].tokens(0, 1) - shared
        assert (shared > 0) == (layout[0] > 1)  # they open alike, but one alone shares nothing
        assert sum(batch.supervised for batch in batches) == ours[0].supervised_tokens(0, 1)


def test_ranks_without_a_document_idle(corpus_of):
    batches = [next(iter(order.micro_batches(0, 0))) for order in orders(corpus_of([3]), (1, 2, 4))]
    assert sorted(batch.supervised for batch in batches) == [0, 0, 0, 4]
    assert sorted(len(batch.tokens) for batch in batches)[:3] == [1, 1, 1]


def test_the_tokens_of_one_micro_step_are_alike_on_all_ranks(corpus_of):
    corpus = corpus_of([int(size) for size in np.random.default_rng(0).lognormal(4, 1, 64)])

    def waste(shuffle):
        ours = orders(corpus, (4, 4, 4), shuffle=shuffle)
        steps = zip(*(order.micro_batches(0, 0) for order in ours), strict=True)
        return sum(
            max(len(batch.tokens) for batch in step) * 4 - sum(len(batch.tokens) for batch in step) for step in steps
        )

    assert waste(True) < waste(False) / 3


def test_documents_are_dealt_forth_and_back_by_length(corpus_of):
    sizes = [10, 80, 30, 60, 50, 40, 70, 20]
    ours = orders(corpus_of(sizes), (2, 2, 2))
    slots = [[[sizes[i] for i in batch.sample_ids] for batch in order.micro_batches(0, 0)] for order in ours]
    assert slots == [[[80, 10], [60, 30]], [[70, 20], [50, 40]]]


def test_without_shuffling_the_order_of_the_file_stays(corpus_of):
    order = orders(corpus_of(SIZES), (2, 4, 1), shuffle=False)[0]
    found = [batch.sample_ids for step in range(3) for batch in order.micro_batches(4, step)]
    assert [i for ids in found for i in ids] == list(range(23)) and found[0] == (0, 1)
    assert collections.Counter(map(len, found)) == {2: 11, 1: 1}


def test_batches_hold_the_documents_they_name(corpus_of):
    corpus = corpus_of(SIZES)
    for batch in orders(corpus, (2, 4, 1))[0].micro_batches(0, 0):
        tokens = np.concatenate([corpus.document(i)[0] for i in batch.sample_ids])
        labels = np.concatenate([corpus.document(i)[1] for i in batch.sample_ids])
        assert batch.tokens.tolist() == tokens.tolist() and batch.labels.tolist() == labels.tolist()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("max_tokens", [None, 10**6])
def test_documents_of_one_length_keep_their_order(corpus_of, shuffle, max_tokens):
    """Whatever the machine's sorting makes of ties: ranks on other CPUs must deal alike."""
    order = orders(corpus_of([10, 20] * 32), (64, 1, 1), shuffle=shuffle, max_tokens=max_tokens)[0]
    ids = order.global_ids(0, 0).tolist()
    found = [i for batch in order.micro_batches(0, 0) for i in batch.sample_ids]
    assert found == (sorted(ids, key=lambda i: -(i % 2)) if shuffle or max_tokens else ids)


def test_defaults(corpus_of):
    """One rank, seed 0, shared prefixes, no bound on tokens."""
    corpus = corpus_of(SIZES)
    given = GlobalOrder(
        corpus, batch_size=2, accum_iter=4, dp_rank=0, dp_size=1, seed=0, shuffle=True, max_tokens=None,
        share_prefixes=True,
    )  # fmt: skip
    found, wanted = (
        [(batch.sample_ids, batch.shared) for batch in order.micro_batches(1, 0)]
        for order in (GlobalOrder(corpus, batch_size=2, accum_iter=4), given)
    )
    assert found == wanted and any(sum(shared) for _, shared in found)


def test_a_step_beyond_the_epoch_is_an_error(corpus_of):
    with pytest.raises(IndexError, match=r"^step 3 is not among the 3 of an epoch$"):
        list(orders(corpus_of(SIZES), (2, 4, 1))[0].micro_batches(0, 3))


TOKENS = [int(size) for size in np.random.default_rng(1).lognormal(4, 1, 40).clip(1, 900)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("slack", [0, 100, 10_000])
def test_micro_batches_by_tokens_hold_the_same_documents_a_step_and_no_more_tokens_than_allowed(
    corpus_of, layout, slack
):
    corpus = corpus_of(TOKENS)
    most = int(corpus.lengths.max()) + slack
    ours, one = orders(corpus, layout, max_tokens=most), orders(corpus, (8, 1, 1))[0]
    for epoch in range(2):
        for step in range(one.steps_per_epoch):
            assert sorted(trained(ours, epoch, step)) == sorted(one.global_ids(epoch, step).tolist())
            batches = [list(order.micro_batches(epoch, step)) for order in ours]
            assert len({len(own) for own in batches}) == 1
            assert all(len(batch.tokens) <= most for own in batches for batch in own)
            assert all(sum(batch.lengths) == len(batch.tokens) for own in batches for batch in own)
    assert ours[0].steps_per_epoch == one.steps_per_epoch == 5


def test_micro_batches_by_tokens_are_few_and_alike_on_all_ranks(corpus_of):
    corpus = corpus_of(TOKENS)
    most = int(corpus.lengths.max())
    ours = orders(corpus, (5, 4, 2), max_tokens=most)  # all documents in one step
    batches = [[len(batch.tokens) for batch in order.micro_batches(0, 0)] for order in ours]
    total = int(corpus.lengths.sum())
    assert len(batches[0]) <= -(-total // (2 * most)) + 1
    waste = sum(abs(one - two) for one, two in zip(*batches, strict=True))
    assert waste < 0.05 * total


def test_documents_are_dealt_by_tokens_longest_first_to_the_emptiest(corpus_of):
    sizes = [10, 80, 30, 60, 50, 40, 70, 20]
    corpus = corpus_of(sizes)
    extra = int(corpus.lengths[0]) - 10  # prompt and end, in tokens
    ours = orders(corpus, (2, 2, 2), max_tokens=90 + 2 * extra)
    slots = [[[sizes[i] for i in batch.sample_ids] for batch in order.micro_batches(0, 0)] for order in ours]
    assert slots == [[[80, 10], [60, 30]], [[70, 20], [50, 40]]]
    whole = orders(corpus, (2, 2, 2), max_tokens=1000)
    assert [[len(batch.lengths) for batch in order.micro_batches(0, 0)] for order in whole] == [[4], [4]]


def test_ranks_wait_little_for_each_other_where_micro_batches_by_tokens_are_uneven(corpus_of):
    sizes = [100, 60, 60, 50, 45]
    corpus = corpus_of(sizes)
    extra = int(corpus.lengths[0]) - 100
    ours = orders(corpus, (2, 2, 2), max_tokens=95 + 2 * extra)
    slots = [[[sizes[i] for i in batch.sample_ids] for batch in order.micro_batches(0, 0)] for order in ours]
    assert slots == [[[50, 45], [60]], [[100], [60]]]  # not the 100 beside a 60


def test_ranks_without_a_document_idle_by_tokens_too(corpus_of):
    batches = [list(order.micro_batches(0, 0)) for order in orders(corpus_of([3]), (1, 2, 4), max_tokens=1000)]
    assert [len(own) for own in batches] == [1] * 4
    assert sorted(batch.supervised for own in batches for batch in own) == [0, 0, 0, 4]
    assert sorted(len(batch.tokens) for own in batches for batch in own)[:3] == [1, 1, 1]


def test_a_document_longer_than_a_micro_batch_is_refused_at_once(corpus_of):
    corpus = corpus_of([5, 50, 7])
    longest = int(corpus.lengths[1])
    with pytest.raises(ConfigError) as caught:
        orders(corpus, (2, 4, 1), max_tokens=longest - 1)
    assert str(caught.value) == (
        f"--max_tokens {longest - 1}: document 1, the longest, has {longest} tokens. Give --max_tokens {longest} or "
        f"more, or cut documents with --max_words {longest - 1}."
    )
    assert orders(corpus, (2, 4, 1), max_tokens=longest)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_micro_batch_has_more_than_the_most_tokens(corpus_of, layout):
    corpus = corpus_of(TOKENS)
    lengths = np.sort(corpus.lengths)
    for most in (None, int(lengths[-1]), int(lengths[-1]) + 300, 10**6):
        ours = orders(corpus, layout, max_tokens=most)
        seen = [len(b.tokens) for order in ours for step in range(5) for b in order.micro_batches(0, step)]
        assert max(seen) <= ours[0].most_tokens
        documents = layout[0] if most is None else 8
        assert ours[0].most_tokens == min(lengths[-documents:].sum(), most or 10**9)


def test_documents_of_a_rank(corpus_of):
    """Those of its micro-batches."""
    for order in orders(corpus_of(SIZES), (2, 1, 2)):
        for epoch, step in ((0, 0), (1, 5)):
            found = [i for batch in order.micro_batches(epoch, step) for i in batch.sample_ids]
            assert order.documents(epoch, step).tolist() == found


def test_documents_of_about_one_length_stand_together(corpus_of, monkeypatch):
    """Each once, in other steps each epoch, the same ones on any layout and for whoever begins in the middle."""
    monkeypatch.setattr("accessory.data.order._SORTED_TOGETHER", 6)
    sizes = [int(size) for size in np.random.default_rng(5).integers(1, 200, 100)]
    corpus = corpus_of(sizes)
    ours, plain = (orders(corpus, (2, 2, 2), group_by_length=grouped) for grouped in (True, False))
    spans = {}
    for name, (order, other) in (("grouped", ours), ("plain", plain)):
        ids = [order.global_ids(0, step) for step in range(order.steps_per_epoch)]
        assert sorted(np.concatenate(ids).tolist()) == list(range(100)) and len(ids[-1]) == 4
        assert trained([order, other], 0, 2) and ids[7].tolist() == other.global_ids(0, 7).tolist()
        spans[name] = np.mean([np.ptp(corpus.lengths[batch]) for batch in ids])
    assert spans["grouped"] < spans["plain"] / 4
    means = [corpus.lengths[ours[0].global_ids(0, step)].mean() for step in range(12)]
    assert sorted(means, reverse=True) != means and sorted(means) != means
    fresh = orders(corpus, (8, 1, 1), group_by_length=True)[0]
    assert fresh.global_ids(1, 3).tolist() == ours[0].global_ids(1, 3).tolist()
    assert fresh.global_ids(1, 3).tolist() != fresh.global_ids(0, 3).tolist()
