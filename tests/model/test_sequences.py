"""Where each token of a packed batch stands."""

from __future__ import annotations

import pytest
import torch

from accessory.model.position import rotations_at
from accessory.model.sequences import Sequences

FREQUENCIES = torch.tensor([1.0, 0.25, 0.0625])


def test_positions_restart_in_each_document() -> None:
    """Three documents of 2, 3 and 1 tokens."""
    found = Sequences.build((2, 3, 1), FREQUENCIES)
    assert found.starts == (0, 0, 0)
    assert found.rotations.shape == (6, 1, 3)
    assert torch.equal(found.rotations, rotations_at(FREQUENCIES, torch.tensor([0, 1, 0, 1, 2, 0])))


def test_positions_go_on_from_the_cache() -> None:
    """New tokens of documents that have 5 and 0 tokens already."""
    found = Sequences.build((2, 1), FREQUENCIES, starts=(5, 0))
    assert torch.equal(found.rotations, rotations_at(FREQUENCIES, torch.tensor([5, 6, 0])))
    assert found.ends == (7, 1)


def test_offsets_and_longest() -> None:
    """Cumulative ends, int32 as the variable-length kernels want them."""
    found = Sequences.build((2, 3, 1), FREQUENCIES)
    assert found.documents.offsets.tolist() == [0, 2, 5, 6]
    assert found.documents.offsets.dtype == torch.int32
    assert found.documents.longest == 3


def test_shared_beginnings_are_counted_on_from() -> None:
    """The second document's third token is its first that is packed; with a cache there are none."""
    found = Sequences.build((3, 4), FREQUENCIES, shared=(0, 2))
    assert found.positions.tolist() == [0, 1, 2, 2, 3]
    assert found.documents.offsets.tolist() == [0, 3, 7]
    with pytest.raises(AssertionError, match="cannot share"):
        Sequences.build((3, 4), FREQUENCIES, (1, 1), (0, 2))


def test_positions_are_kept_for_who_looks_them_up() -> None:
    """Those that the rotations were made of."""
    assert Sequences.build((2, 1), FREQUENCIES, starts=(5, 0)).positions.tolist() == [5, 6, 0]
    assert Sequences.build((2, 3), torch.empty(0)).rotations.shape == (5, 1, 0)
