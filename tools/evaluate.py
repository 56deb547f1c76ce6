"""How good a model is: tasks of the lm-eval harness, and perplexity:

python tools/evaluate.py MODEL --tasks piqa,arc_easy --task_data DIR      or:  ... MODEL --perplexity FILE --seq 1024
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError, DataError
from accessory.eval.harness import Harness, TaskFigures, TaskSettings
from accessory.eval.perplexity import Perplexity, perplexity
from accessory.eval.report import table, task_object, task_rows, write_predictions
from accessory.meta import MetaModel
from accessory.parallel import groups


def main(
    *model: str,
    tasks: str | tuple[str, ...] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_data: str = "",
    protocol: str | float = "0.4",
    perplexity: str = "",
    seq: int = 2048,
    windows: int | None = None,
    predictions: str = "",
    json: bool = False,
    llama_type: str | None = None,
    llama_config: str = "",
    tokenizer_path: str = "",
    max_seq_len: int = 4096,
    dtype: str = "bf16",
    quant: bool | None = None,
    quant_type: str | None = None,
    device: str = "auto",
    model_parallel_size: int = 1,
    batch_tokens: int | None = None,
) -> None:
    """Print figures of MODEL: a base, a trained part (whose run.json knows its base), or a base and a part.

    Under torchrun, ranks divide the documents, or with --model_parallel_size the model.

    Args:
        tasks: names of the lm-eval harness, with commas between: piqa,boolq,mmlu (`lm-eval ls tasks` lists all).
        num_fewshot: examples before each question; absent: the task's own number, mostly 0.
        limit: only so many documents of each task.
        task_data: a directory with the tasks' files, where there is no network.
        protocol: 0.4, or 0.3: context and continuation tokenized apart, no BOS.
        perplexity: a text file whose perplexity is computed in GPTQ's protocol.
        seq: tokens of a window of it.
        windows: how many of them; absent: all.
        predictions: a file to write what was answered to: a line of JSON for each document.
        json: end with one line of JSON.
        llama_type: as in training; absent: what the checkpoint says.
        llama_config: as in training; absent: what the checkpoint says.
        tokenizer_path: another tokenizer than the checkpoint's.
        max_seq_len: longest text that is read; the beginning of a longer context is left out.
        dtype: bf16, fp16 or fp32.
        quant: pack the base; absent: as in training.
        quant_type: a format, as --quant_type of training.
        device: auto, cpu, cuda or cuda:N.
        model_parallel_size: ranks that share the model.
        batch_tokens: tokens of a batch; absent: what suits the device.
    """
    names = [name for name in (tasks.split(",") if isinstance(tasks, str) else map(str, tasks)) if name]
    if not model or not (names or perplexity):
        raise ConfigError("Expected MODEL, and what to compute: --tasks NAMES or --perplexity FILE.")
    text = _read(Path(str(perplexity))) if perplexity else ""
    layout = groups.start(device, model_parallel_size=model_parallel_size)
    loaded = MetaModel.from_pretrained(
        [str(path) for path in model],
        llama_type=llama_type,
        llama_config=str(llama_config),
        tokenizer_path=str(tokenizer_path) or None,
        max_seq_len=max_seq_len,
        dtype=dtype,
        quant=quant,
        quant_type=quant_type,
        layout=layout,
    )
    place = Path(str(task_data)) if task_data else None
    settings = TaskSettings(num_fewshot, limit, place, str(protocol), batch_tokens, shows=layout.is_main)
    figures = _tasks(loaded, names, settings) if names else []
    found = _perplexity(loaded, text, seq, windows) if text else None
    if not layout.is_main:
        return
    if figures:
        print(table([row for each in figures for row in task_rows(each)]))
    if found:
        print(_sentence(found, seq))
    if predictions:
        write_predictions(Path(str(predictions)), figures)
    if json:
        print(_line(" + ".join(map(str, model)), str(protocol), figures, found))


def _read(path: Path) -> str:
    """The text of a file. Raises `DataError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--perplexity {path}: cannot be read ({error}).") from error


def _tasks(model: MetaModel, names: list[str], settings: TaskSettings) -> list[TaskFigures]:
    harness = Harness(model, settings)
    harness.check(names)
    return [harness.run(name) for name in names]


def _perplexity(model: MetaModel, text: str, seq: int, windows: int | None) -> Perplexity:
    return perplexity(model, text, seq, windows)


def _sentence(found: Perplexity, seq: int) -> str:
    count = f"{found.windows} window{'s' * (found.windows != 1)} of {seq} tokens"
    return f"perplexity {found.perplexity:.4f} +- {found.stderr:.4f} ({count})"


def _line(model: str, protocol: str, figures: list[TaskFigures], found: Perplexity | None) -> str:
    line = {"model": model, "protocol": protocol, "tasks": {each.name: task_object(each) for each in figures}}
    return json.dumps(line | ({"perplexity": found._asdict()} if found else {}))


if __name__ == "__main__":
    run_tool(from_command_line(main))
