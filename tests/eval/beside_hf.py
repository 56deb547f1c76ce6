"""The same tasks by our model and by the harness's own `hf` model on the same files, one after the other:

python -m tests.eval.beside_hf MODEL DIR --tasks piqa,boolq --limit 200 --threads 2 --batch_size 16

For each task: documents a second of both (wall and processor's time), how many predictions differ, and by how much
log-likelihoods do, all in fp32.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import fire
import torch
from lm_eval.models.huggingface import HFLM

from accessory.eval.harness import Harness, TaskFigures, TaskSettings
from accessory.meta import MetaModel

SIX = "piqa,boolq,wic,winogrande,arc_easy,arc_challenge"


class Beside(NamedTuple):
    """Of a task: figures of both, wall and processor's seconds of both (ours first), and what differs."""

    ours: TaskFigures
    theirs: TaskFigures
    wall: tuple[float, float]
    processor: tuple[float, float]
    predictions: int
    greedy: int
    log_p: float


class TheirHarness(Harness):
    """The harness with its own model of a Hugging Face directory."""

    def __init__(self, directory: Path, settings: TaskSettings, batch_size: int) -> None:
        super().__init__(None, settings, HFLM(str(directory), dtype="float32", device="cpu", batch_size=batch_size))


def compare(ours: Harness, theirs: Harness, task: str) -> Beside:
    """Run a task by both."""
    figures, wall, processor = [], [], []
    for harness in (ours, theirs):
        at, used = time.monotonic(), time.process_time()
        figures.append(harness.run(task))
        wall.append(time.monotonic() - at)
        processor.append(time.process_time() - used)
    pairs = [_differ(*pair) for pair in zip(*(each.predictions for each in figures), strict=True)]
    predictions, greedy, log_p = zip(*pairs, strict=True)
    return Beside(*figures, tuple(wall), tuple(processor), sum(predictions), sum(greedy), max(log_p))


def _differ(one: dict[str, Any], other: dict[str, Any]) -> tuple[bool, bool, float]:
    """Whether the likeliest choice differs, whether what is greedy does, and the largest difference of log p."""
    (mine, my_greedy), (theirs, their_greedy) = (zip(*sample["filtered_resps"], strict=True) for sample in (one, other))
    likeliest = [max(range(len(values)), key=lambda i, v=values: v[i]) for values in (mine, theirs)]
    return (
        likeliest[0] != likeliest[1],
        my_greedy != their_greedy,
        max(abs(a - b) for a, b in zip(mine, theirs, strict=True)),
    )


def main(
    model: str,
    task_data: str,
    tasks: str = SIX,
    limit: int = 200,
    threads: int = 2,
    batch_size: int = 16,
    num_fewshot: int = 0,
) -> None:
    """Print a line for each task."""
    torch.set_num_threads(threads)
    settings = TaskSettings(num_fewshot, limit, Path(task_data))
    loaded = MetaModel.from_pretrained(model, dtype="fp32", device="cpu", max_seq_len=8192)
    ours, theirs = Harness(loaded, settings), TheirHarness(Path(model), settings, batch_size)
    for task in tasks.split(",") if isinstance(tasks, str) else tasks:
        found = compare(ours, theirs, task)
        rates = [[found.ours.documents / seconds for seconds in pair] for pair in (found.wall, found.processor)]
        said = [f"{mine:.2f} against {other:.2f} ({mine / other:.2f} x)" for mine, other in rates]
        print(
            f"{task}: {found.ours.documents} documents; a second {said[0]}, a processor's second {said[1]}; "
            f"{found.predictions} predictions and {found.greedy} greedy differ, log p by {found.log_p:.1e}; "
            f"{found.ours.metrics} {found.theirs.metrics == found.ours.metrics}",
            flush=True,
        )


if __name__ == "__main__":
    fire.Fire(main)
