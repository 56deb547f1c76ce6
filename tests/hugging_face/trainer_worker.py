"""Run under torchrun: Trainer trains LoRA in our model, each process on its documents of every step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from accessory.parallel import groups
from tests.hugging_face.test_accessory_lm import BATCH, trainer

base, folder = map(Path, sys.argv[1:])
training = trainer(base, folder, per_device_train_batch_size=BATCH // 2, save_strategy="no")
training.train()
assert isinstance(training.model_wrapped, DistributedDataParallel)
(folder / f"losses{dist.get_rank()}.json").write_text(json.dumps(training.losses))
groups.end_process()
