"""Run under torchrun: Trainer trains a side network, each process on its documents of every step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from accessory.hugging_face import QSTConfig, QSTLlamaForCausalLM
from accessory.parallel import groups
from tests.hugging_face.loaded_models import SIDE, loaded
from tests.hugging_face.training import ACCUMULATED, trainer

base, folder = map(Path, sys.argv[1:])
theirs = loaded(base)
model = QSTLlamaForCausalLM(theirs, theirs.config, QSTConfig(**SIDE))
assert dist.get_world_size() == ACCUMULATED, "one micro-batch a process"
training = trainer(model, base, folder, accumulated=1, save_strategy="no")
training.train()
assert isinstance(training.model_wrapped, DistributedDataParallel)
(folder / f"losses{dist.get_rank()}.json").write_text(json.dumps(training.losses))
groups.end_process()
