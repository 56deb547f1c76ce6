"""Run under torchrun: trains once for each list of flags in a JSON file, in the same processes."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from fairscale.nn.model_parallel import destroy_model_parallel

from accessory.config import FinetuneConfig, parse
from accessory.finetuning import finetune
from accessory.parallel import groups

for flags in json.loads(Path(sys.argv[1]).read_text()):
    finetune(parse(FinetuneConfig, flags))
    destroy_model_parallel()  # the next run may lay other groups over the same processes
groups.end_process()
