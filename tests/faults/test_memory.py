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
MOST = 1.03
"""How many times what there was once it had settled may be there at the end."""


@pytest.mark.parametrize("precision", ["bf16", "fp32"] if LONG else ["bf16"])
def test_memory_does_not_grow(job: Job, python, tmp_path: Path, precision: str) -> None:
    """What is resident and what is in use at the end are within 3 % of what they were once they had settled.

    Micro-batches have other numbers of tokens in every step, which libraries compile and remember products for.
    """
    every = STEPS // SAVES
    flags = job.flags(
        *("--precision", precision, "--epochs", str(STEPS), "--max_steps", str(STEPS), "--batch_size", "4"),
        *("--accum_iter", "2", "--save_steps", str(every), "--save_interval", str(STEPS), "--keep_last", "2"),
    )
    worker = Path(__file__).with_name("memory_worker.py")
    done = python(worker, tmp_path / "memory.json", *flags, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert len(memory) == STEPS
    for name, values in zip(("resident", "in use"), zip(*memory, strict=True), strict=True):
        settled, saved, last = values[SETTLED - 1], max(values[every : 2 * every]), max(values[-every:])
        print(f"{precision}: MiB {name} after steps {SETTLED}, {every + 1}, {STEPS}:",
              *(f"{value / 2**20:.1f}" for value in (settled, saved, last)))  # fmt: skip
        assert last < MOST * settled and last < MOST * saved, (name, settled, saved, last)
