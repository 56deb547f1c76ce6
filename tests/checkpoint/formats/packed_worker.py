"""One of two model-parallel ranks that load packed checkpoints (argv), each beside its logits.pt of one process."""

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
            values = tensors[target.name].read().chunk(2, target.slicing.dim)[layout.mp_rank]
            equal += torch.equal(weight.unpack(torch.float32), values)
    expected = torch.load(f"{path}/logits.pt", weights_only=True)
    error = (model.logits(TOKENS, (40,)) - expected).abs().max() / expected.abs().max()
    sys.stdout.write(f"{Path(path).name}: matrices {equal} equal, logits {'close' if error < 1e-5 else error}\n")
    sys.stdout.flush()
groups.end_process()
