"""How good a model is: tasks of the lm-eval harness, perplexity, MMLU, and metrics of texts that it wrote:

python tools/evaluate.py MODEL --tasks piqa,arc_easy --task_data DIR      or:  ... MODEL --perplexity FILE --seq 1024
"""

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError, DataError
from accessory.eval.harness import Harness, TaskFigures, TaskSettings
from accessory.eval.mmlu import mmlu, read_mmlu
from accessory.eval.perplexity import perplexity
from accessory.eval.report import figure_object, figure_rows, table, task_object, task_rows, write_predictions
from accessory.eval.statistics import Figure
from accessory.eval.text_metrics import read_pairs, text_figures
from accessory.memory.exhausted import out_of_memory_as
from accessory.meta import MetaModel
from accessory.parallel import groups

COLUMNS = ("figure", "of", "value", "stderr")


def main(
    *model: str,
    tasks: str | tuple[str, ...] = (),
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_data: str = "",
    protocol: str | float = "0.4",
    predictions: str = "",
    perplexity: str = "",
    seq: int = 2048,
    windows: int | None = None,
    mmlu: str = "",
    texts: str = "",
    language: str = "auto",
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
        predictions: a file to write what was answered in tasks to: a line of JSON for each document.
        perplexity: a text file whose perplexity is computed in GPTQ's protocol.
        seq: tokens of a window of it.
        windows: how many of them; absent: all.
        mmlu: a file of MMLU as qlora keeps it: lines with subject, input and output.
        texts: a file of predictions beside what was expected, for ROUGE and BLEU; it needs no MODEL.
        language: of those texts: zh, en, or auto.
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
    asked = bool(names or perplexity or mmlu)
    if asked != bool(model) or not (asked or texts):
        raise ConfigError("Expected MODEL with --tasks, --perplexity or --mmlu, or --texts.")
    if predictions:
        _make_room_for(Path(str(predictions)), names)
    # Files are read before the model, which takes longer.
    text = _read(Path(str(perplexity))) if perplexity else None
    items = read_mmlu(Path(str(mmlu))) if mmlu else None
    found: dict[str, dict[str, Figure]] = {}
    if texts:
        found["texts"] = text_figures(read_pairs(Path(str(texts))), language)
    figures: list[TaskFigures] = []
    is_main = True
    if model:
        layout = groups.start(device, model_parallel_size=model_parallel_size)
        is_main = layout.is_main
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
        settings = TaskSettings(num_fewshot, limit, place, str(protocol), batch_tokens, shows=is_main)
        figures = _tasks(loaded, names, settings) if names else []
        if text is not None:
            with _memory_for("--perplexity", "a smaller --seq"):
                found["perplexity"] = _perplexity(loaded, text, seq, windows)
        if items:
            with _memory_for("--mmlu", "a smaller --max_seq_len"):
                found["mmlu"] = _mmlu(loaded, items)
    if is_main:
        _print(figures, found, str(protocol))
        if predictions:
            write_predictions(Path(str(predictions)), figures)
        if json:
            print(_line(" + ".join(map(str, model)), str(protocol), figures, found, seq))


def _make_room_for(path: Path, tasks: list[str]) -> None:
    """Make the file's directory. Raises `ConfigError`, before hours of computing, where it cannot be written."""
    if not tasks:
        raise ConfigError(f"--predictions {path}: goes with --tasks, whose documents it lists.")
    if path.is_dir():
        raise ConfigError(f"--predictions {path}: is a directory; expected a file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--predictions {path}: its directory cannot be made ({error.strerror}).") from error


def _read(path: Path) -> str:
    """The text of a file. Raises `DataError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--perplexity {path}: cannot be read ({error}).") from error


def _tasks(model: MetaModel, names: list[str], settings: TaskSettings) -> list[TaskFigures]:
    harness = Harness(model, settings)
    harness.check(names)
    if settings.shows and model.prompt_layouts:
        layouts = ", ".join(model.prompt_layouts)
        print(f"tasks are asked in their own words, as published figures are; trained on: {layouts}", file=sys.stderr)
    found = []
    for name in names:
        with _memory_for(f"--tasks {name}", "a smaller --batch_tokens, a smaller --max_seq_len"):
            found.append(harness.run(name))
    return found


def _memory_for(what: str, remedies: str) -> AbstractContextManager[None]:
    """A context in which memory that runs out is told with what was computed."""
    more = "--quant, --dtype bf16 or --model_parallel_size on more ranks"
    return out_of_memory_as(lambda: f"{what}: out of memory. Less memory is needed with {remedies}, {more}.")


def _perplexity(model: MetaModel, text: str, seq: int, windows: int | None) -> dict[str, Figure]:
    found = perplexity(model, text, seq, windows)
    return {f"of {found.windows} windows of {seq}": Figure(found.perplexity, found.stderr)}


def _mmlu(model: MetaModel, items: list) -> dict[str, Figure]:
    found = mmlu(model, items)
    return {"accuracy": found.accuracy, "loss": found.loss, **found.subjects}


def _print(figures: list[TaskFigures], found: dict[str, dict[str, Figure]], protocol: str) -> None:
    if figures:
        print(table([row for each in figures for row in task_rows(each)]))
        print(f"protocol {protocol}, without a chat template")
    if found:
        print(table([row for name, each in found.items() for row in figure_rows(name, each)], COLUMNS))


def _line(model: str, protocol: str, figures: list[TaskFigures], found: dict[str, dict[str, Figure]], seq: int) -> str:
    line = {"model": model, "protocol": protocol, "chat_template": False}
    line["tasks"] = {each.name: task_object(each) for each in figures}
    objects = {name: figure_object(each) for name, each in found.items()}
    if "perplexity" in objects:
        (objects["perplexity"],) = objects["perplexity"].values()
        objects["perplexity"] |= {"seq": seq}
    return json.dumps(line | objects)


if __name__ == "__main__":
    run_tool(from_command_line(main))
