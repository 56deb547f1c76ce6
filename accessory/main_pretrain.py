"""Pretrain: `torchrun accessory/main_pretrain.py --help`; also as a module, from inside accessory/, plain python."""

import sys
from pathlib import Path

if not __package__:  # started as a script: what Python put first on the path is this folder, not the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.parallel.allocator import start_without_thread_caches
from accessory.parallel.launcher import die_with_launcher

if __name__ == "__main__":
    start_without_thread_caches()
die_with_launcher()  # before the imports that take seconds

from accessory.config import PretrainConfig
from accessory.entry import run_entry
from accessory.pretraining import pretrain

if __name__ == "__main__":
    run_entry(PretrainConfig, pretrain)
