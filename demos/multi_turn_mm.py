"""Talk with a model about an image, on a page served on this machine; another image begins another conversation.

torchrun --nproc-per-node=RANKS demos/multi_turn_mm.py --pretrained_path BASE TRAINABLE --quant
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import ImagePageConfig
from accessory.entry import run_entry
from demos.multi_turn import main

if __name__ == "__main__":
    run_entry(ImagePageConfig, main)
