"""What LoRA's dropout does not see."""

from __future__ import annotations

import pytest
import torch

from accessory.kernels.addition import NOTHING, Addition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_mask(dtype: torch.dtype) -> None:
    """Its share of zeros, wherever they are; the same at every call, other ones by another seed; no draw of others'."""
    x, before = torch.full((300, 400), 7, dtype=dtype), torch.get_rng_state()
    one, again, other = (Addition(dropout=0.3, seed=seed).dropout_mask(x) for seed in (5, 5, 6))
    assert (one.shape, one.dtype) == (x.shape, dtype) and set(one.unique().tolist()) == {0, 1}
    assert abs((one == 0).double().mean() - 0.3) < 5 * (0.3 * 0.7 / x.numel()) ** 0.5
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before) and (x == 7).all()


def test_nothing_is_dropped_by_default() -> None:
    assert (NOTHING.dropout_mask(torch.zeros(50, 50)) == 1).all()
