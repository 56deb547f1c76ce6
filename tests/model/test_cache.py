"""The key/value cache."""

from __future__ import annotations

import torch

from accessory.model.cache import LayerCache
from accessory.model.sequences import Sequences

FREQUENCIES = torch.tensor([1.0, 0.5])


def test_new_tokens_stand_behind_the_old() -> None:
    """Two documents grow by 2 and 1, then by 1 and 2; what was not written stays zero."""
    cache = LayerCache((2, 5, 3, 4), torch.float32, torch.device("cpu"))
    keys = torch.arange(6 * 12, dtype=torch.float32).view(6, 3, 4) + 1
    values = -keys
    cache.store(keys[:3], values[:3], Sequences.build((2, 1), FREQUENCIES))
    cache.store(keys[3:], values[3:], Sequences.build((1, 2), FREQUENCIES, starts=(2, 1)))
    assert torch.equal(cache.keys[0, :3], keys[[0, 1, 3]])
    assert torch.equal(cache.keys[1, :3], keys[[2, 4, 5]])
    assert torch.equal(cache.values[0, :3], values[[0, 1, 3]])
    assert torch.equal(cache.values[1, :3], values[[2, 4, 5]])
    assert not cache.keys[:, 3:].any()
    assert not cache.values[:, 3:].any()


def test_dtype_and_shape() -> None:
    """As asked for."""
    cache = LayerCache((1, 7, 2, 4), torch.bfloat16, torch.device("cpu"))
    assert cache.keys.shape == cache.values.shape == (1, 7, 2, 4)
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16


def filled() -> LayerCache:
    """Four documents of three tokens each, in room for five: document i holds numbers from 100 i on."""
    cache = LayerCache((4, 5, 3, 4), torch.float32, torch.device("cpu"))
    keys = torch.arange(36, dtype=torch.float32).view(3, 3, 4).repeat(4, 1, 1)
    keys += 100 * torch.arange(4).repeat_interleave(3)[:, None, None]
    cache.store(keys, -keys, Sequences.build((3, 3, 3, 3), FREQUENCIES))
    return cache


def test_some_documents_in_the_same_memory() -> None:
    """What is stored through a part is in the whole, at the part's place."""
    cache = filled()
    part = cache.documents(1, 3)
    assert torch.equal(part.keys, cache.keys[1:3])
    assert torch.equal(part.values, cache.values[1:3])
    new = torch.full((2, 3, 4), 7.0)
    part.store(new, -new, Sequences.build((1, 1), FREQUENCIES, starts=(3, 3)))
    assert (cache.keys[1:3, 3] == 7).all() and (cache.values[1:3, 3] == -7).all()
    assert not cache.keys[[0, 3], 3].any() and len(cache.keys) == 4


def test_kept_documents_move_up() -> None:
    """Their tokens stay theirs, nothing is allocated, and new tokens are stored at their new places."""
    for rows in ([0, 1], [1, 3], [2], [0, 1, 2, 3]):
        cache, before = filled(), filled()
        address = cache.keys.data_ptr()
        cache.keep(rows, 3)
        assert cache.keys.shape == cache.values.shape == (len(rows), 5, 3, 4)
        assert cache.keys.data_ptr() == address
        assert torch.equal(cache.keys[:, :3], before.keys[rows, :3])
        assert torch.equal(cache.values[:, :3], before.values[rows, :3])
        new = torch.arange(len(rows) * 12, dtype=torch.float32).view(-1, 3, 4)
        cache.store(new, -new, Sequences.build((1,) * len(rows), FREQUENCIES, starts=(3,) * len(rows)))
        assert torch.equal(cache.keys[:, 3], new)


def test_documents_grow_and_begin_alike() -> None:
    """Room is made behind what is kept; the first document's beginning is given to all."""
    cache = filled()
    before = cache.keys.clone()
    cache.grow(9, 2)
    assert cache.keys.shape == cache.values.shape == (4, 9, 3, 4)
    assert torch.equal(cache.keys[:, :2], before[:, :2]) and torch.equal(cache.values[:, :2], -before[:, :2])
    assert not cache.keys[:, 2:].any()
    cache.copy_first(2)
    for document in range(4):
        assert torch.equal(cache.keys[document, :2], before[0, :2])
        assert torch.equal(cache.values[document, :2], -before[0, :2])


def test_what_is_beside_goes_along() -> None:
    """A document's own tensors, such as its picture's prefix, are cut, moved and copied as its keys are."""
    rows = torch.arange(8.0).view(4, 2)

    def cache() -> LayerCache:
        made = filled()
        made.beside = {"prefix": rows.clone()}
        return made

    part = cache().documents(1, 3)
    assert torch.equal(part.beside["prefix"], rows[1:3])
    kept = cache()
    kept.keep([1, 3], 3)
    assert torch.equal(kept.beside["prefix"], rows[[1, 3]])
    alike = cache()
    alike.copy_first(2)
    assert torch.equal(alike.beside["prefix"], rows[:1].expand(4, 2))
