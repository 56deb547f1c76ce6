"""Talk with a model about an image in the terminal.

python demos/multi_model_cli.py --pretrained_path BASE TRAINABLE --quant --image IMAGE --n_gpus 2
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.config import ImageTerminalConfig
from accessory.entry import run_entry
from demos.single_model_cli import main

if __name__ == "__main__":
    run_entry(ImageTerminalConfig, main)
