"""An entry, or a tool, whose last collective's tensors are still to be freed as the process ends.

argv: entry or tool, then the entry's flags. Exits with what the `ConfigError` means that both end with.
"""

import atexit
import sys
import time


@atexit.register  # before PyTorch's own, so that it is called last
def begin_collective() -> None:
    """A thread of gloo's copies 8 MiB, then waits for the interpreter's lock, which is not let go of any more."""
    sys.setswitchinterval(100)
    group.allgather([[torch.empty(1 << 21)]], [torch.ones(1 << 21)])
    began = time.monotonic()
    while time.monotonic() < began + 1:
        pass


import torch
import torch.distributed as dist

from accessory.config import DemoConfig
from accessory.entry import run_entry, run_tool
from accessory.errors import ConfigError
from accessory.parallel import groups


def main(config: DemoConfig | None = None) -> None:
    """Start the groups, of which one is still referred to at the end, as after a training run."""
    global group
    groups.start("cpu")
    group = dist.group.WORLD
    sys.stdout.write("written")
    raise ConfigError("said")


if sys.argv.pop(1) == "tool":
    run_tool(main)
run_entry(DemoConfig, main)
