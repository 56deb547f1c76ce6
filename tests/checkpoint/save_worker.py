"""Run under torchrun with two ranks: writes slices of known tensors, then into a place where nothing can be written."""

import sys
from pathlib import Path

import torch

from accessory.checkpoint.save import CheckpointWriter
from accessory.errors import CheckpointError
from accessory.parallel import groups
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import Slicing
from accessory.tokenizer import open_tokenizer

output, base = Path(sys.argv[1]), Path(sys.argv[2])
layout = groups.start("cpu", model_parallel_size=2)
tokenizer = open_tokenizer(base)
whole = torch.arange(48.0).view(6, 8)
dims = {"rows": 0, "columns": 1, "whole": None}


def weights():
    """This rank's slices, gathered as they are iterated."""
    parts = {name: whole if dim is None else whole.chunk(2, dim)[layout.mp_rank] for name, dim in dims.items()}
    return NamedParameters(parts, {name: Slicing(dim=dim) for name, dim in dims.items()}).gathered()


CheckpointWriter(output, "model", {}, tokenizer).write("epoch0", weights(), {}, {}, 1)
(output / "file").touch()
try:
    CheckpointWriter(output / "file", "model", {}, tokenizer).write("epoch0", weights(), {}, {}, 1)
except CheckpointError as error:
    (output / f"refused.{layout.rank}").write_text(str(error))
groups.end_process()
