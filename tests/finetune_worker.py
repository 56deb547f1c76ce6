"""Run under torchrun: fine-tunes once for each list of flags in a JSON file, in the same processes.

Where the model is whole on a model-parallel group, what was saved is loaded again and compared with what was trained.
A run may be refused, as its run_status.json says, but not after weights were read.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import destroy_model_parallel

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import accessory.training as assembly
from accessory.config import FinetuneConfig, parse
from accessory.errors import AccessoryError
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from accessory.parallel import groups


def check_reload(model: MetaModel, config: FinetuneConfig) -> None:
    """What the checkpoint gives back answers bit for bit as the model that was trained."""
    layout = groups.start(config.device, config.model_parallel_size)
    (saved,) = config.output_dir.glob("epoch*")
    again = MetaModel.from_pretrained(saved, dtype=config.precision, layout=layout)
    tokens = torch.arange(48) * 7 % 500
    assert torch.equal(model.eval().logits(tokens, (40, 8)), again.logits(tokens, (40, 8)))
    print("reloaded bit for bit", flush=True)


def fill_and_note(*args, **kwargs) -> None:
    """`fill`, which reads the weights."""
    begun.append(config)
    fill(*args, **kwargs)


fill, begun = assembly.fill, []
assembly.fill = fill_and_note
for flags in json.loads(Path(sys.argv[1]).read_text()):
    config = parse(FinetuneConfig, flags)
    try:
        model = finetune(config)
        if dist.get_world_size() == config.model_parallel_size and config.resume is None:  # not sharded over data
            check_reload(model, config)
    except AccessoryError:
        if config in begun:
            raise
    destroy_model_parallel()  # the next run may lay other groups over the same processes
groups.end_process()
