"""One of two model-parallel ranks that load packed checkpoints (argv) and hold their codes against the files'."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from accessory.checkpoint.load import targets
from accessory.checkpoint.opening import open_source
from accessory.meta import MetaModel
from accessory.parallel import groups
from accessory.quant import PackedWeight

TOKENS = torch.arange(40) * 7 % 500

layout = groups.start("cpu", 2)
for path in sys.argv[1:]:
    model = MetaModel.from_pretrained(path, dtype="fp32", layout=layout)
    tensors = open_source(path).tensors
    equal = 0
    for target in targets(model.llma):
        weight = getattr(target.owner, target.leaf)
        if isinstance(weight, PackedWeight):
            whole = tensors[target.name].read_packed()["codes"].view(tensors[target.name].shape[0], -1)
            mine = whole.chunk(2, target.slicing.dim)[layout.mp_rank]
            values = tensors[target.name].read().chunk(2, target.slicing.dim)[layout.mp_rank]
            equal += torch.equal(weight.codes.flatten(), mine.flatten()) and torch.equal(
                weight.unpack(torch.float32), values
            )
    sys.stdout.write(f"codes {equal} equal\n")
    sys.stdout.flush()
groups.end_process()
