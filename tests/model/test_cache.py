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
