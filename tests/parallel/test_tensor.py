"""Tensor parallelism (on two ranks: test_ranks.py)."""

from __future__ import annotations

import pytest
import torch

from accessory.parallel.tensor import WHOLE, Slicing, own_slice, pad_slice, padded_bounds, slice_bounds


def test_slice_bounds_cover_everything() -> None:
    assert [slice_bounds(12, rank, 3) for rank in range(3)] == [(0, 4), (4, 8), (8, 12)]
    with pytest.raises(AssertionError, match="cannot be cut"):
        slice_bounds(10, 0, 3)


def test_padded_bounds_cover_everything() -> None:
    """As even as can be with equal slices; equal to `slice_bounds` where these are even; perhaps with nothing left."""
    assert [padded_bounds(10, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [padded_bounds(12, rank, 3) for rank in range(3)] == [slice_bounds(12, rank, 3) for rank in range(3)]
    assert [padded_bounds(5, rank, 4) for rank in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]


def test_own_slices_are_the_whole_behind_zeros() -> None:
    """Along either dimension; what is not cut is itself."""
    whole = torch.arange(1.0, 31.0).view(10, 3)
    for dim, tensor in ((0, whole), (1, whole.t())):
        slicing = Slicing(dim=dim, whole=10)
        parts = [own_slice(tensor, slicing, rank, 4) for rank in range(4)]
        assert {part.shape[dim] for part in parts} == {3}
        assert torch.equal(torch.cat(parts, dim), pad_slice(tensor, dim, 12))
        assert torch.equal(torch.cat(parts, dim).narrow(dim, 0, 10), tensor)
        assert not torch.cat(parts, dim).narrow(dim, 10, 2).any()
        assert slicing.whole_shape(tuple(parts[0].shape), 4) == tuple(tensor.shape)
    assert own_slice(whole, WHOLE, 1, 4) is whole
    assert Slicing(dim=1).whole_shape((10, 3), 4) == (10, 12)
    assert WHOLE.whole_shape((10, 3), 4) == (10, 3)
    with pytest.raises(AssertionError, match="cannot be cut"):
        own_slice(whole, Slicing(dim=0), 0, 4)
