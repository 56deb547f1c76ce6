"""Run under torchrun with two ranks: they choose as many layers, though one rank's step takes more than the other's."""

import sys
from pathlib import Path

import torch

from accessory.memory.plan import MemoryPlan
from accessory.memory.recompute import available_memory, choose_layers
from accessory.parallel import groups

layout = groups.start("cpu")
free = available_memory(torch.device("cpu"))


def plan(layers: int) -> MemoryPlan:
    """In shares of the machine's free memory, of which a rank has half: rank 1 needs two layers' worth more."""
    return MemoryPlan(0, 0, 0, 0, 0, 0, 0, working=int((0.5 + 0.2 * layout.rank - 0.1 * layers) * free))


alone = next(layers for layers in range(9) if plan(layers).total <= 0.45 * free)
chosen, _ = choose_layers("auto", 8, plan, layout, "")
Path(sys.argv[1], str(layout.rank)).write_text(f"{alone} {chosen}")
groups.end_process()
