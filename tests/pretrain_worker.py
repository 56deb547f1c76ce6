"""Run under torchrun, or alone: pretrains once for each list of flags in a JSON file, in the same processes.

A list may begin with `kill=N` or `term=N`: then the process gets that signal while it reads the rows of step N.
"""

import json
import os
import signal
import sys
from pathlib import Path

from fairscale.nn.model_parallel import destroy_model_parallel

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import PretrainConfig, parse
from accessory.data.raw.order import TextOrder
from accessory.errors import Preempted
from accessory.parallel import groups
from accessory.pretraining import pretrain

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM}
rows, strike = TextOrder.rows, None


def struck_rows(order: TextOrder, number: int) -> list:
    """`TextOrder.rows`, in whose midst a signal may come."""
    if strike and number == int(strike[1]):
        os.kill(os.getpid(), SIGNALS[strike[0]])
    return rows(order, number)


TextOrder.rows = struck_rows
for flags in json.loads(Path(sys.argv[1]).read_text()):
    strike = flags.pop(0).split("=") if "=" in flags[0] else None
    try:
        pretrain(parse(PretrainConfig, flags))
    except Preempted as error:
        print(f"Preempted: {error}", flush=True)
    destroy_model_parallel()  # the next run may lay other groups over the same processes
groups.end_process()
