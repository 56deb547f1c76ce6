"""Data parallelism on two real ranks (checks in worker.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_two_ranks(torchrun) -> None:
    done = torchrun(2, Path(__file__).with_name("worker.py"), "data")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("OK") == 2  # one a rank; their lines may run into each other


def test_a_process_alone_does_not_load_fsdp() -> None:
    """Half a second of every start; without it no tensor is a shard."""
    lines = (
        "import sys, torch, accessory.finetuning",
        "from accessory.parallel.data import is_sharded, whole",
        "x = torch.ones(2)",
        "assert not is_sharded(x) and whole(x) is x",
        "assert not {'torch.distributed.fsdp', 'torch.distributed.tensor'} & sys.modules.keys()",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
