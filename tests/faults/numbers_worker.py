"""Run under torchrun with two ranks: in step 3, rank 1 meets a number that is not finite, each kind in its own run.

Writes, for each rank and run, what was raised, and whether what is trained is as after step 2: a JSON list in RESULTS.
"""

import json
import math
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import destroy_model_parallel
from safetensors.torch import load_file

from accessory.config import FinetuneConfig, parse
from accessory.engine import Engine
from accessory.errors import AccessoryError
from accessory.finetuning import finetune
from accessory.parallel import groups

STEP = 3


class InfiniteGradient(torch.autograd.Function):
    """The identity, with a gradient beyond all bounds."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


KINDS = {
    "nan": lambda loss: loss * math.nan,
    "1e39": lambda loss: loss * 1e39,  # beyond fp32
    "inf gradient": InfiniteGradient.apply,
}
accumulate, forward, seen = Engine._accumulate, Engine._forward, {}


def accumulate_and_remember(self, progress, *given):
    seen.update(engine=self, step=progress.total_steps + 1, micro=0)
    return accumulate(self, progress, *given)


def forward_with_fault(self, batch, hits):
    loss = forward(self, batch, hits)
    seen["micro"] += 1
    if (seen["step"], seen["micro"], dist.get_rank()) == (STEP, 2, 1):
        seen["fired"], seen["ids"] = True, batch.sample_ids
        loss = KINDS[kind](loss)
    return loss


Engine._accumulate, Engine._forward = accumulate_and_remember, forward_with_fault
flags, results = json.loads(Path(sys.argv[1]).read_text()), []
for kind, more in (*((kind, []) for kind in KINDS), ("nan", ["--not_finite", "skip"])):
    seen.clear()
    output = Path(sys.argv[2]) / f"{kind} {' '.join(more)}".strip().replace(" ", "_")
    try:
        finetune(parse(FinetuneConfig, [*flags, "--save_steps", "1", "--output_dir", str(output), *more]))
        said = "nothing was raised"
    except AccessoryError as error:
        said = f"{type(error).__name__}: {error}"
    engine = seen["engine"]
    now = dict(engine.parameters.gathered())
    before = load_file(output / f"epoch0-iter{STEP - 1}" / "trainable.safetensors")
    unchanged = all(torch.equal(before[name], value) for name, value in now.items())
    results.append([kind, said, seen.get("fired", False), list(seen.get("ids", ())), seen["step"], unchanged])
    destroy_model_parallel()
every = [None] * dist.get_world_size()
dist.all_gather_object(every, results)
if dist.get_rank() == 0:
    Path(sys.argv[3]).write_text(json.dumps(every))
groups.end_process()
