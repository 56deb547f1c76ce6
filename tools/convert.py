"""Write a checkpoint as another format:

python tools/convert.py SOURCE TARGET --to hf|gguf|meta|upstream|accessory      a whole model
python tools/convert.py TRAINED TARGET --to peft                                a trained part, for peft
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError
from accessory.export import Destination, convert, export_adapter


def main(
    source: str,
    target: str,
    to: str = "accessory",
    dtype: str = "bf16",
    gguf_type: str = "f16",
    model_parallel_size: int = 1,
    architecture: str = "",
    llama_config: str = "",
    tokenizer_path: str = "",
    drop_biases: bool = False,
) -> None:
    """Convert SOURCE into the new TARGET.

    Args:
        source: any checkpoint that --pretrained_path takes.
        target: what to write: a new directory, or for gguf a new file.
        to: accessory, hf, gguf, meta, upstream (LLaMA2-Accessory), or peft for a trained part.
        dtype: of plain weights: bf16, fp16 or fp32.
        gguf_type: of a GGUF file's matrices: f16, bf16, f32 or q8_0.
        model_parallel_size: shards of a meta or upstream checkpoint.
        architecture: model type to write it as, such as llama for an InternLM; absent: its own.
        llama_config: a JSON file of settings for a source that has none.
        tokenizer_path: a tokenizer for a source that has none.
        drop_biases: with --to peft, leave out biases the base has no place for.
    """
    if to == "peft":
        export_adapter([Path(str(source))], Path(str(target)), drop_biases=drop_biases)
    elif drop_biases:
        raise ConfigError("--drop_biases goes with --to peft, or with tools/merge.py.")
    else:
        destination = Destination(to, dtype, gguf_type, model_parallel_size, architecture or None)
        convert(
            [Path(str(source))],
            Path(str(target)),
            destination,
            llama_config=[Path(str(llama_config))] if llama_config else [],
            tokenizer_path=Path(str(tokenizer_path)) if tokenizer_path else None,
        )
    print(f"{source} -> {target} ({to})")


if __name__ == "__main__":
    run_tool(from_command_line(main))
