"""Standard errors against hand-written ones."""

from __future__ import annotations

import math

import pytest

from accessory.eval.statistics import mean, mean_of_means


def test_mean_and_its_error() -> None:
    """As the harness computes it for an accuracy: with one less than the number of documents."""
    found = mean([1, 0, 0, 1, 1])
    assert found == pytest.approx((0.6, math.sqrt(0.6 * 0.4 / 4)))
    assert mean([3.0])[0] == 3 and math.isnan(mean([3.0]).stderr)


def test_groups_count_alike() -> None:
    """However many documents each has."""
    small, large = [1.0, 0.0], [1.0] * 9 + [0.0]
    found, errors = mean_of_means([small, large]), [mean(group).stderr for group in (small, large)]
    assert found == pytest.approx(((0.5 + 0.9) / 2, math.hypot(*errors) / 2))
