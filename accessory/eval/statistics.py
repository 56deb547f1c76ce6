"""Figures with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Figure(NamedTuple):
    """A value, and its standard error over documents; nan where one document tells none."""

    value: float
    stderr: float


def mean(values: Sequence[float]) -> Figure:
    """The mean of at least one value, each of another document."""
    count, middle = len(values), math.fsum(values) / len(values)
    if count == 1:
        return Figure(middle, math.nan)
    return Figure(middle, math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (count - 1) / count))


def mean_of_means(groups: Sequence[Sequence[float]]) -> Figure:
    """The mean over groups of their means, each group counting alike however many documents it has."""
    each = [mean(group) for group in groups]
    error = math.sqrt(math.fsum(figure.stderr**2 for figure in each)) / len(each)
    return Figure(math.fsum(figure.value for figure in each) / len(each), error)
