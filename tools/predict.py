"""Answer the questions of a data file and keep the answers beside those expected, for tools/evaluate.py --texts:

python tools/predict.py MODEL --data val.json --output predictions.jsonl --max_gen_len 128
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.data.layouts import layout_note
from accessory.data.pictures import UNCROPPED
from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError
from accessory.eval.predict import predictions, questions
from accessory.memory.exhausted import out_of_memory_as
from accessory.meta import MetaModel, Sampling
from accessory.parallel import groups

LESS_MEMORY = (
    "Less memory is needed with a smaller --max_gen_len, --quant, --dtype bf16 or --model_parallel_size on more ranks."
)


def main(
    *model: str,
    data: str,
    output: str = "predictions.jsonl",
    limit: int | None = None,
    max_gen_len: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    system_prompt: str | None = None,
    image_transform: str = UNCROPPED,
    max_seq_len: int = 4096,
    dtype: str = "bf16",
    quant: bool | None = None,
    quant_type: str | None = None,
    device: str = "auto",
    model_parallel_size: int = 1,
) -> None:
    """Write a line of JSON for each document of DATA: prompt, reference and prediction, as MODEL was trained to answer.

    Args:
        model: a base, a trained part (whose run.json knows its base), or a base and a part.
        data: questions with answers, as --data_config of training.
        output: the file to write; it must not exist.
        limit: only so many documents.
        max_gen_len: longest answer, in tokens.
        temperature: 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that together have this probability.
        seed: of the sampling.
        system_prompt: prompt layout of all questions; absent: that of the training data.
        image_transform: how the image of a record becomes a square: resized_center_crop or padded_resize.
        max_seq_len: longest question and answer together, in tokens.
        dtype: bf16, fp16 or fp32.
        quant: pack the base; absent: as in training.
        quant_type: a format, as --quant_type of training.
        device: auto, cpu, cuda or cuda:N.
        model_parallel_size: ranks that share the model.
    """
    target = Path(str(output))
    if target.exists():
        raise ConfigError(f"--output {target}: is there already; give another file.")
    if not model:
        raise ConfigError("Expected MODEL: a checkpoint, or a base and a trained part.")
    layout = groups.start(device, model_parallel_size=model_parallel_size)
    loaded = MetaModel.from_pretrained(
        [str(path) for path in model],
        max_seq_len=max_seq_len, dtype=dtype, quant=quant, quant_type=quant_type, layout=layout,
    )  # fmt: skip
    how = Sampling.of(max_gen_len=max_gen_len, temperature=temperature, top_p=top_p, seed=seed)
    asked = questions(loaded, Path(str(data)), system_prompt, image_transform)
    if layout.is_main:
        print(asked.report, file=sys.stderr, flush=True)
        if system_prompt and (note := layout_note(loaded.prompt_layouts, system_prompt)):
            print(note, file=sys.stderr, flush=True)
    with out_of_memory_as(lambda: f"Out of memory in the answers. {LESS_MEMORY}"):
        lines = [json.dumps(found, ensure_ascii=False) for found in predictions(loaded, asked, limit=limit, how=how)]
    if layout.is_main:
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
        drawn = f" (drawn by --seed {seed})" if temperature else ""
        print(f"{len(lines)} predictions{drawn} -> {target}")


if __name__ == "__main__":
    run_tool(from_command_line(main))
