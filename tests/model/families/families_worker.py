"""Run under torchrun: measures every checkpoint of a directory, cut over all ranks; rank 0 writes what it found."""

import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[3])

from accessory.parallel import groups
from tests.model.families.subject import measure

layout = groups.start("cpu", model_parallel_size=2)
root = Path(sys.argv[1])
found = {path.name: measure(path, layout) for path in sorted(root.iterdir()) if path.is_dir()}
if layout.is_main:
    torch.save(found, sys.argv[2])
groups.end_process()
