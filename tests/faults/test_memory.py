"""Memory stays what it is after the first steps, however many follow, and however often they are saved."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.faults.job import Job

LONG = "CHAOS" in os.environ
"""Whether there is time for 3,000 steps and 50 saves."""
STEPS, SETTLED, SAVES = (3000, 50, 50) if LONG else (80, 8, 5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"] if LONG else ["bf16"])
def test_memory_does_not_grow(job: Job, python, tmp_path: Path, precision: str) -> None:
    """Before the last save within 3 % of what it was once it had settled, and of what it was after the first save.

    Micro-batches have other numbers of tokens in every step, which libraries compile and remember products for.
    """
    every = STEPS // SAVES
    flags = job.flags(
        *("--precision", precision, "--epochs", str(STEPS), "--max_steps", str(STEPS), "--batch_size", "4"),
        *("--accum_iter", "2", "--save_steps", str(every), "--save_interval", str(STEPS), "--keep_last", "2"),
    )
    worker = Path(__file__).with_name("memory_worker.py")
    done = python(worker, tmp_path / "resident.json", *flags, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    resident = json.loads((tmp_path / "resident.json").read_text())
    assert len(resident) == STEPS
    settled, saved, last = resident[SETTLED - 1], max(resident[every : 2 * every]), max(resident[-every:])
    print(f"{precision}: MB after steps {SETTLED}, {every + 1}, {STEPS}:", *(b >> 20 for b in (settled, saved, last)))
    assert last < 1.03 * settled and last < 1.03 * saved, (settled, saved, last)
