"""An engine that trains little, and remembers what it is to save."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from accessory.checkpoint.training_state import Progress
from accessory.data.corpus import build_corpus
from accessory.data.order import GlobalOrder
from accessory.engine import Engine, StepSettings
from accessory.meta import MetaModel
from accessory.optim import build_optimizer
from accessory.parallel import groups
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import WHOLE
from accessory.run.report import Reporter
from accessory.run.saving import Saver
from accessory.run.schedule import Schedule
from accessory.run.signals import StopSignals


class Saves(Saver):
    """Remembers what it is to save: (name, steps, mean loss)."""

    def __init__(self) -> None:
        self.made, self.losses, self.saved_at = [], [], time.monotonic()

    def write(self, progress: Progress, loss: float | None, only_best: bool) -> None:
        self.made.append((progress.checkpoint_name, progress.total_steps, loss))


@pytest.fixture
def engine(tiny_base: Path, tmp_path: Path) -> Engine:
    """Trains the norms of the tiny model, plain SGD-like steps of 2 x 3 documents on 8 records."""
    groups.start("cpu")
    model = MetaModel.from_pretrained(tiny_base, dtype="fp32")
    parameters = {n: p.requires_grad_() for n, p in model.llma.named_parameters() if n.endswith("norm.weight")}
    data = tmp_path / "data.json"
    records = [{"instruction": "x" * n, "output": "answer " * n} for n in range(1, 9)]
    data.write_text(json.dumps(records))
    order = GlobalOrder(build_corpus(data, model.tokenizer, max_words=128), batch_size=3, accum_iter=2)
    return Engine(
        model=model,
        parameters=NamedParameters(parameters, dict.fromkeys(parameters, WHOLE)),
        optimizer=build_optimizer("adamw", parameters, 1e-3, 0.0),
        order=order,
        schedule=Schedule(2, order.steps_per_epoch, 0.0, 1e-3, 1e-3, -1.0, 1, 1),
        settings=StepSettings(),
        reporter=Reporter(None, 4, 0, enabled=False),
        saver=Saves(),
        signals=StopSignals(),
    )
