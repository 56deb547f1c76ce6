"""Write a checkpoint as another format:

python tools/convert.py SOURCE TARGET --to hf|gguf|meta|upstream|accessory      a whole model
python tools/convert.py PACKED TARGET --to gptq|awq|greenbit|accessory          whole numbers in groups, as they are
python tools/convert.py TRAINED TARGET --to peft                                a trained part, for peft
python tools/convert.py BASE PART [PART ...] TARGET --to peft                   parts trained one upon the other
python tools/convert.py TRAINED TARGET --to qst                                 a side network, for the published QST
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.entry import from_command_line, run_tool, sources_and_target
from accessory.errors import ConfigError
from accessory.export import Destination, asking_hint, convert, export_adapter, export_side, transformers_hint


def main(
    *paths: str,
    to: str = "accessory",
    dtype: str = "bf16",
    gguf_type: str = "f16",
    model_parallel_size: int = 1,
    architecture: str = "",
    llama_config: str = "",
    tokenizer_path: str = "",
    no_visual: bool = False,
    drop_biases: bool = False,
    base_model: str = "",
) -> None:
    """Convert the first PATHS, all of which make one model as for --pretrained_path, into the last, a new TARGET.

    Args:
        to: accessory, hf, gptq, awq, greenbit, gguf, meta, upstream (LLaMA2-Accessory); of a trained part peft or qst.
        dtype: of plain weights: bf16, fp16 or fp32.
        gguf_type: of a GGUF file's matrices: f16, bf16, f32, q8_0, or packed (as they are, where GGUF can).
        model_parallel_size: shards of a meta or upstream checkpoint.
        architecture: model type to write it as, such as llama for an InternLM; absent: its own.
        llama_config: a JSON file of settings for a source that has none.
        tokenizer_path: a tokenizer for a source that has none.
        no_visual: leave out the image encoder and what belongs to it.
        drop_biases: with --to peft, leave out biases the base has no place for.
        base_model: with --to peft, the directory or Hub name that peft's users load; absent: where the base lies.
    """
    *sources, target = sources_and_target(paths)
    reading = {
        "llama_config": [Path(str(llama_config))] if llama_config else [],
        "tokenizer_path": Path(str(tokenizer_path)) if tokenizer_path else None,
        "no_visual": no_visual,
    }
    if to == "peft":
        name = str(base_model) or None
        said = export_adapter(sources, target, drop_biases=drop_biases, base_name=name, **reading)
    elif drop_biases or base_model:
        flag, place = ("--base_model", "") if base_model else ("--drop_biases", ", or with tools/merge.py")
        raise ConfigError(f"{flag} goes with --to peft{place}.")
    elif to == "qst":
        said = export_side(sources, target, **reading)
    else:
        destination = Destination(to, dtype, gguf_type, model_parallel_size, architecture or None)
        convert(sources, target, destination, **reading)
        said = transformers_hint(target) if to == "hf" else None
    hints = filter(None, (said, asking_hint(sources, target, to)))
    print(f"{' + '.join(map(str, sources))} -> {target} ({to})", *hints, sep="\n")


if __name__ == "__main__":
    run_tool(from_command_line(main))
