"""What the evaluations of a run have found so far; it is saved with the training state, so that a resumed run knows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from accessory.errors import CheckpointError

_KINDS = {"documents": (str,), "evaluated": (int,), "before": (int, float), "best": (int, float), "best_step": (int,),
          "checkpoint": (str,), "only_best": (bool,), "waited": (int,)}  # fmt: skip


@dataclass
class ValidationState:
    """documents: a digest of the documents that are evaluated on. evaluated: steps taken when that was last done.

    before: the loss before the first step. best: the lowest one after it, at `best_step`, whose checkpoint has the name
    `checkpoint`, and `only_best` if it was saved for nothing else. waited: evaluations since then. None: none yet.
    """

    documents: str
    evaluated: int | None = None
    before: float | None = None
    best: float | None = None
    best_step: int | None = None
    checkpoint: str | None = None
    only_best: bool = False
    waited: int = 0

    def note(self, step: int, loss: float) -> bool:
        """Note the loss after `step` steps; returns whether it is the lowest of a trained model so far."""
        self.evaluated = step
        if step == 0:
            self.before = loss if math.isfinite(loss) else None
            return False
        improved = math.isfinite(loss) and (self.best is None or loss < self.best)
        self.waited = 0 if improved else self.waited + 1
        if improved:
            self.best, self.best_step = loss, step
        return improved

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def of(record: Any, where: str) -> ValidationState | None:
        """The state that `record` says, None where there is none. Raises `CheckpointError`, naming `where`."""
        if record is None:
            return None
        if not isinstance(record, dict) or record.keys() != _KINDS.keys() or not all(
            type(value) in _KINDS[name] or (value is None and name not in ("documents", "only_best", "waited"))
            for name, value in record.items()
        ):  # fmt: skip
            raise CheckpointError(f"{where}: 'validation' is {record!r:.200}; expected {', '.join(_KINDS)}.")
        return ValidationState(**record)
