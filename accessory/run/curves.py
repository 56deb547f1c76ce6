"""Reads a run's JSON log back, and draws its loss curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Curves(NamedTuple):
    """Loss by step, in order: of each step in training, and of each evaluation."""

    training: dict[int, float]
    validation: dict[int, float]


def read_curves(log: Path) -> Curves:
    """The losses in a JSON log.

    Where a resumed run wrote a step again, what the earlier run wrote from there on is dropped. A line that a killed
    run left unfinished is passed over.
    """
    training: dict[int, float] = {}
    validation: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        step, evaluated = entry["step"], "val_loss" in entry
        curve = validation if evaluated else training
        if step <= next(reversed(curve), -1):  # an evaluation comes after the step of the same number
            training = {at: loss for at, loss in training.items() if at < step + evaluated}
            validation = {at: loss for at, loss in validation.items() if at < step}
            curve = validation if evaluated else training
        value = entry["val_loss" if evaluated else "loss"]
        curve[step] = math.nan if value is None else value
    return Curves(training, validation)


def read_losses(log: Path) -> dict[int, float]:
    """The training loss by step; see `read_curves`."""
    return read_curves(log).training


def loss_figure(curves: Curves) -> Figure:
    """The loss curves, steps marked by whole numbers however few they are."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    training, validation = curves
    single = "." if len(training) == 1 else None
    axes.plot(training.keys(), training.values(), linewidth=1.2, marker=single, label="training")
    title = "training loss"
    if validation:
        axes.plot(validation.keys(), validation.values(), linewidth=1.2, marker="o", markersize=4, label="validation")
        axes.legend()
        title = "training and validation loss"
    axes.set(xlabel="step", ylabel="loss per supervised token", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    return figure
