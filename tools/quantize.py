"""Pack a base into 4 or 8 bits once, so that later starts neither read nor pack its full weights:

python tools/quantize.py BASE TARGET --quant_type nf4       or, for transformers + bitsandbytes:  ... --to hf
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.entry import from_command_line, run_tool
from accessory.errors import CheckpointError
from accessory.export import Destination, open_base
from accessory.quant import storage


def main(base: str, target: str, quant_type: str = "nf4", to: str = "accessory", dtype: str = "bf16") -> None:
    """Write BASE as the new directory TARGET with the linears of all blocks packed.

    Args:
        base: any full-precision checkpoint that --pretrained_path takes.
        target: a new directory.
        quant_type: a format, as --quant_type of training; one that bitsandbytes has for --to hf.
        to: accessory, or hf for bitsandbytes' layout, which transformers loads.
        dtype: of embedding, head and norms.
    """
    storage(quant_type)
    destination = Destination(to, dtype, quant_type=quant_type)
    model, sources = open_base([Path(str(base))])
    if packed := next((source.storage for source in sources if source.storage), None):
        raise CheckpointError(f"{base}: is packed as {packed} already; packing it again would lose more.")
    destination.write(model, Path(str(target)))
    print(f"{base} -> {target} ({quant_type}, {to})")


if __name__ == "__main__":
    run_tool(from_command_line(main))
