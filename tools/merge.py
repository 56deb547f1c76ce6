"""Put a trained part into its base, and say how far the result is from the model as trained:

python tools/merge.py TRAINED TARGET --to hf        or:  python tools/merge.py BASE TRAINED TARGET --to gguf
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.blueprint import DTYPES
from accessory.entry import from_command_line, run_tool, sources_and_target
from accessory.errors import check_known
from accessory.export import Destination, asking_hint, logit_error, merge, transformers_hint


def main(
    *paths: str,
    to: str = "hf",
    base: str = "",
    dtype: str = "bf16",
    gguf_type: str = "f16",
    model_parallel_size: int = 1,
    architecture: str = "",
    llama_config: str = "",
    tokenizer_path: str = "",
    no_visual: bool = False,
    drop_biases: bool = False,
    probe: str | None = None,
    precision: str = "bf16",
) -> None:
    """Merge a trained part into its base; PATHS end with the new TARGET: a directory, or for gguf a file.

    What comes before is the trained part, whose run.json knows its base; or base and part where that has moved.

    Args:
        to: hf, gguf, meta, upstream (LLaMA2-Accessory) or accessory; gptq, awq or greenbit with --base packed.
        base: dequantized adds to what packing left of the base, as training saw it; packed leaves that packed, beside
            norms and biases (accessory and hf); full adds to the weights in its files, which changes answers; absent:
            what training saw.
        dtype: of plain weights: bf16, fp16 or fp32.
        gguf_type: of a GGUF file's matrices: f16, bf16, f32, q8_0, or packed (as they are, where GGUF can).
        model_parallel_size: shards of a meta or upstream checkpoint.
        architecture: model type to write it as; absent: its own.
        llama_config: a JSON file of settings for a base that has none.
        tokenizer_path: the tokenizer to write, such as the base's own; tokens that training added are added to it.
        no_visual: leave out the image encoder and what belongs to it.
        drop_biases: leave out the biases that training added.
        probe: text whose logits are compared; absent: a question and its answer as the part was trained on.
        precision: of that comparison.
    """
    *sources, target = sources_and_target(paths)
    check_known("--precision", precision, DTYPES)
    destination = Destination(to, dtype, gguf_type, model_parallel_size, architecture or None)
    reading = {
        "llama_config": [Path(str(llama_config))] if llama_config else [],
        "tokenizer_path": Path(str(tokenizer_path)) if tokenizer_path else None,
        "no_visual": no_visual,
    }
    base = merge(sources, target, destination, base=str(base) or None, drop_biases=drop_biases, **reading)
    print(f"{' + '.join(map(str, sources))} -> {target} ({to}, base {base})")
    text = None if probe is None else str(probe)
    error = logit_error(sources, target, text, precision, **reading)
    said = transformers_hint(target) if to == "hf" else None
    print(f"against the model as trained: {error}", *filter(None, (said, asking_hint(sources, target, to))), sep="\n")


if __name__ == "__main__":
    run_tool(from_command_line(main))
