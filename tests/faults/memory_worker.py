"""Fine-tunes with the flags after the first argument, and writes there what is resident after each step: JSON, bytes.

A process of its own, so that nothing else is measured.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.config import FinetuneConfig, parse
from accessory.engine import Engine
from accessory.finetune import finetune

PAGE = 4096
step, resident = Engine.step, []


def step_and_look(self, progress):
    result = step(self, progress)
    resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
    return result


Engine.step = step_and_look
finetune(parse(FinetuneConfig, sys.argv[2:]))
Path(sys.argv[1]).write_text(json.dumps(resident))
