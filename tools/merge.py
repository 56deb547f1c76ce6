"""Put a trained part into its base, and say how far the result is from the model as trained:

python tools/merge.py TRAINED TARGET --to hf        or:  python tools/merge.py BASE,TRAINED TARGET --to gguf
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.entry import from_command_line, run_tool
from accessory.export import Destination, check_precision, logit_error, merge


def main(
    trained: str,
    target: str,
    to: str = "hf",
    base: str = "full",
    dtype: str = "bf16",
    gguf_type: str = "f16",
    model_parallel_size: int = 1,
    architecture: str = "",
    drop_biases: bool = False,
    probe: str | None = None,
    precision: str = "bf16",
) -> None:
    """Merge TRAINED into its base and write the new TARGET.

    Args:
        trained: the trained part's directory, whose run.json knows its base; or BASE,TRAINED where it has moved.
        target: what to write: a new directory, or for gguf a new file.
        to: hf, gguf, meta, upstream (LLaMA2-Accessory) or accessory.
        base: full adds to the weights in the base's files; dequantized to what 4 bits left of them, as training saw it.
        dtype: of plain weights: bf16, fp16 or fp32.
        gguf_type: of a GGUF file's matrices: f16, bf16, f32 or q8_0.
        model_parallel_size: shards of a meta or upstream checkpoint.
        architecture: model type to write it as; absent: its own.
        drop_biases: leave out the biases that training added.
        probe: text whose logits are compared; absent: a question and its answer as the part was trained on.
        precision: of that comparison.
    """
    paths = _paths(",".join(map(str, trained)) if isinstance(trained, (tuple, list)) else str(trained))
    check_precision(precision)
    destination = Destination(to, dtype, gguf_type, model_parallel_size, architecture or None)
    merge(paths, Path(str(target)), destination, base=base, drop_biases=drop_biases)
    print(f"{' + '.join(map(str, paths))} -> {target} ({to}, base {base})")
    text = None if probe is None else str(probe)
    print(f"against the model as trained: {logit_error(paths, Path(str(target)), text, precision)}")


def _paths(text: str) -> list[Path]:
    """The paths between commas; a comma is part of a name where such a file is there."""
    parts, paths = text.split(","), []
    while parts:
        taken = next((n for n in range(len(parts), 0, -1) if Path(",".join(parts[:n])).exists()), 1)
        paths.append(Path(",".join(parts[:taken])))
        parts = parts[taken:]
    return paths


if __name__ == "__main__":
    run_tool(from_command_line(main))
