"""What is this checkpoint?  python tools/inspect_checkpoint.py PATH [--tensors]"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.checkpoint.describe import describe
from accessory.checkpoint.opening import open_source
from accessory.entry import from_command_line, run_tool


def main(path: str, tensors: bool = False, base: str = "") -> None:
    """Say what lies at PATH: format, family, shapes, types, quantization, size. Reads no weights.

    Args:
        path: anything that --pretrained_path takes.
        tensors: list every tensor.
        base: the base of a PEFT adapter that does not name one.
    """
    opened = open_source(str(path), open_source(str(base)) if base else None)
    print(describe(opened, every_tensor=tensors))


if __name__ == "__main__":
    run_tool(from_command_line(main))
