"""Run with as many tensor-parallel ranks as torchrun starts: writes the logits [8, V] of BASE with TRAINED."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.generate import next_token_logits
from accessory.meta import MetaModel
from accessory.parallel import groups

base, trained, file = map(Path, sys.argv[1:])
layout = groups.start("cpu", int(os.environ.get("WORLD_SIZE", "1")))
model = MetaModel.from_pretrained([base, trained], dtype="fp32", max_seq_len=64, layout=layout)
decoder = model.llma.eval()
with torch.inference_mode():
    hidden = decoder(torch.arange(40, 48), decoder.sequences((8,)))
    logits = next_token_logits(decoder, hidden)
if layout.is_main:
    save_file({"logits": logits.clone()}, file)
groups.end_process()
