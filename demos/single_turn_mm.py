"""Ask a model that sees images single questions, on a page served on this machine or by --prompt.

torchrun --nproc-per-node=RANKS demos/single_turn_mm.py --pretrained_path BASE TRAINABLE --quant
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import ImageDemoConfig
from accessory.entry import run_entry
from demos.single_turn import main

if __name__ == "__main__":
    run_entry(ImageDemoConfig, main)
