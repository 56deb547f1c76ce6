"""One rank's error becomes everyone's (on ranks: test_ranks.py)."""

from __future__ import annotations

import pytest

from accessory.parallel.agree import differences


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        (1, 1, []),
        (1, 2, [("x", 1, 2)]),
        ({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}}, [("x.b.c", 2, 3)]),
        ([{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 3}], [("x[1].a", 2, 3)]),
        ([1], [1, 2], [("x", [1], [1, 2])]),
        ({}, {"a": None}, []),
        ({"a": 1}, {"b": 2}, [("x.b", None, 2), ("x.a", 1, None)]),
        ("ab", {"a": 1}, [("x", "ab", {"a": 1})]),
    ],
)
def test_what_differs_is_named_as_far_in_as_it_is(one: object, other: object, found: list) -> None:
    assert differences("x", one, other) == found
