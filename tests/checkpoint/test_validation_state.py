"""What evaluations have found so far: the lowest loss, how long ago that was, and the same again from JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from accessory.checkpoint.validation_state import ValidationState
from accessory.errors import CheckpointError


def test_the_lowest_loss_of_a_trained_model() -> None:
    """The untrained one's is kept apart, an equal one is no lower, and one that is not finite never counts."""
    state = ValidationState("digest")
    assert (state.best, state.checkpoint, state.only_best) == (None, None, False)
    assert not state.note(0, 1.0)
    assert (state.before, state.best, state.waited, state.evaluated) == (1.0, None, 0, 0)
    found = [state.note(step, loss) for step, loss in ((5, math.nan), (10, 3.0), (15, 3.0), (20, math.inf), (25, 2.5))]
    assert found == [False, True, False, False, True]
    assert (state.best, state.best_step, state.waited, state.evaluated) == (2.5, 25, 0, 25)
    assert not state.note(30, 2.75) and not state.note(35, 2.75)
    assert (state.best, state.best_step, state.waited) == (2.5, 25, 2)
    unknown = ValidationState("digest")
    unknown.note(0, math.inf)
    assert unknown.before is None


def test_it_comes_back_from_json() -> None:
    state = ValidationState("digest", 30, 4.0, 2.5, 25, "epoch0-iter25", True, 1)
    assert ValidationState.of(json.loads(json.dumps(state.record())), "progress.json") == state
    assert ValidationState.of(ValidationState("digest").record(), "progress.json") == ValidationState("digest")
    assert ValidationState.of(None, "progress.json") is None


@pytest.mark.parametrize("changes", [
    {"best": "2.5"}, {"waited": None}, {"documents": None}, {"only_best": 1}, {"only_best": None},
    {"evaluated": True}, {"more": 1},
], ids=str)  # fmt: skip
def test_what_is_no_such_state(changes: dict[str, Any]) -> None:
    """A bool is no number of steps."""
    said = r"progress.json: 'validation' is \{.*expected documents, evaluated, before, best"
    with pytest.raises(CheckpointError, match=said):
        ValidationState.of(ValidationState("digest").record() | changes, "progress.json")
    for wrong in ([], {"documents": "digest"}):
        with pytest.raises(CheckpointError, match=r"progress.json: 'validation' is"):
            ValidationState.of(wrong, "progress.json")
