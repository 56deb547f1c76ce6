"""Run under torchrun with two ranks: exchanged parts give what they give when they are loaded afresh, on both."""

import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.errors import CheckpointError
from accessory.meta import MetaModel
from accessory.parallel import groups

base, *parts = map(Path, sys.argv[1:])
layout = groups.start("cpu", model_parallel_size=2)
ids = torch.arange(30) * 7 % 500
options = {"layout": layout, "dtype": "fp32", "quant": False}
wanted = [MetaModel.from_pretrained([base, part], **options).logits(ids, (30,)) for part in parts]
model = MetaModel.from_pretrained([base, parts[0]], **options)
for turn in (1, 0, 2, 0):
    model.use(parts[turn])
    assert torch.equal(model.logits(ids, (30,)), wanted[turn]), turn
try:
    model.use(parts[0] if layout.mp_rank else base / "absent")  # one rank's fault is every rank's
except CheckpointError as error:
    assert "no such checkpoint" in str(error)
    assert torch.equal(model.logits(ids, (30,)), wanted[0])
    print(f"rank {layout.mp_rank} refused")
groups.end_process()
