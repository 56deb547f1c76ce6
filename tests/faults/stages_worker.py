"""Run under torchrun with two ranks: a save that fails at one stage after the other, each in a run of its own.

Writes, for each stage and rank, what was raised: a JSON object in RESULTS.
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

import torch.distributed as dist
from fairscale.nn.model_parallel import destroy_model_parallel

from accessory.checkpoint import disk_space, save
from accessory.config import FinetuneConfig, parse
from accessory.errors import AccessoryError
from accessory.finetuning import finetune
from accessory.parallel import groups

STAGES = {
    "write a tensor file": (save, "save_file"),
    "write a document": (save, "write_json"),
    "hash": (save, "manifest_of"),
    "fsync": (save, "_sync"),
    "rename": (save, "_replace"),
    "check the disk space": (disk_space.shutil, "disk_usage"),
}


def failing_at_the_second_save(place: object, name: str) -> None:
    """The first save of the run goes through."""
    original, directories = getattr(place, name), set()

    def fail(*given, **more):
        seen = [path for path in config.output_dir.glob("epoch*") if path.is_dir()]
        if seen:
            directories.add(name)
            raise OSError(5, "Input/output error")
        return original(*given, **more)

    setattr(place, name, fail)
    fail.restore = lambda: setattr(place, name, original)
    fail.fired = directories
    restores.append(fail)


flags, results = json.loads(Path(sys.argv[1]).read_text()), {}
for stage, (place, name) in STAGES.items():
    restores = []
    config = parse(FinetuneConfig, [*flags, "--output_dir", f"{sys.argv[2]}/{name.strip('_')}"])
    failing_at_the_second_save(place, name)
    try:
        finetune(config)
        results[stage] = ["nothing was raised"]
    except AccessoryError as error:
        results[stage] = [type(error).__name__, str(error), sorted(restores[0].fired)]
    restores[0].restore()
    destroy_model_parallel()
every = [None] * dist.get_world_size()
dist.all_gather_object(every, results)
if os.environ["RANK"] == "0":
    Path(sys.argv[3]).write_text(json.dumps(every))
groups.end_process()
