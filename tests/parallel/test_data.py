"""Data parallelism (on two ranks: test_ranks.py)."""

from __future__ import annotations

import subprocess
import sys


def test_a_process_alone_does_not_load_fsdp() -> None:
    """Half a second of every start; without it no tensor is a shard. Nor libraries of images, which may be absent."""
    lines = (
        "import sys, torch, accessory.finetuning",
        "from accessory.parallel.data import is_sharded, whole",
        "x = torch.ones(2)",
        "assert not is_sharded(x) and whole(x) is x",
        "assert not {'torch.distributed.fsdp', 'torch.distributed.tensor'} & sys.modules.keys()",
        "assert not {'transformers', 'PIL'} & sys.modules.keys()",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert not done.returncode, done.stderr
