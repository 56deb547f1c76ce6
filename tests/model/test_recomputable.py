"""What is made again instead of kept, and how a block knows that it runs again."""

from __future__ import annotations

import threading

import pytest
import torch

from accessory.model.recomputable import Recomputable, Recomputation, recomputing


def test_a_tensor_is_kept_as_it_is() -> None:
    """Making it again gives the very tensor, and no copy."""
    x = torch.ones(3)
    kept = Recomputable.of(x)
    assert kept.value is x
    assert kept.make(*kept.inputs) is x


def test_what_can_be_made_again_stays_that() -> None:
    """Wrapped twice it is the same, its inputs are those of its maker."""
    x = torch.arange(3.0)
    doubled = Recomputable(2 * x, (x,), lambda kept: 2 * kept)
    assert Recomputable.of(doubled) is doubled
    assert torch.equal(doubled.make(*doubled.inputs), doubled.value)


def test_a_block_runs_again_only_while_it_says_so() -> None:
    """Several times in a row, not afterwards, and not after an error either."""
    again = Recomputation()
    for _ in range(2):
        assert not recomputing()
        with again:
            assert recomputing()
    with pytest.raises(ValueError, match="in the block"), again:
        raise ValueError("in the block")
    assert not recomputing()


def test_other_threads_do_not_run_again() -> None:
    """Another model may run forward beside a backward."""
    seen = []
    with Recomputation():
        thread = threading.Thread(target=lambda: seen.append(recomputing()))
        thread.start()
        thread.join()
    assert seen == [False]
