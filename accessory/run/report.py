"""What a run shows: a progress bar, lines, a JSON log (null: not finite), the loss curves, and what trackers get."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from accessory.checkpoint.disk_space import disk_fault
from accessory.run.curves import loss_figure, read_curves
from accessory.run.trackers import Tracker

LOG_FILE = "log.jsonl"
CURVE_FILE = "loss.png"
_SCALARS = ("loss", "cross_entropy", "divergence", "perplexity", "accuracy", "lr", "grad_norm", "epoch")


class Distillation(NamedTuple):
    """What a loss with a teacher consists of: the mean cross-entropy of the labels, and the mean divergence.

    The latter is t^2 KL(teacher || student) at the temperature t.
    """

    cross_entropy: float
    divergence: float

    @staticmethod
    def of(loss: float, cross_entropy: float, weight: float) -> Distillation:
        """From the `loss` that was trained, in which the divergence counts `weight`."""
        return Distillation(cross_entropy, (loss - (1 - weight) * cross_entropy) / weight)


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, equal on all ranks. A skipped one may have a `loss` and `grad_norm` that are not finite.

    `accuracy` is the share of answers' tokens that no other token was likelier than. `tokens` are real ones of the
    global batch, `seconds` wall time. `distillation`: what the loss consists of, where there is a teacher.
    """

    step: int
    epoch: float
    loss: float
    accuracy: float
    lr: float
    grad_norm: float
    tokens: int
    supervised: int
    seconds: float
    peak_bytes: int
    figures: dict[str, float] = field(default_factory=dict)
    """Others by name."""
    distillation: Distillation | None = None

    def values(self) -> dict[str, float]:
        """Every figure by its name, the perplexity too, which is that of the labels."""
        apart = ("figures", "distillation")
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in apart}
        parts = self.distillation._asdict() if self.distillation else {}
        return found | parts | {"perplexity": perplexity(parts.get("cross_entropy", self.loss))} | self.figures


class Figures(NamedTuple):
    """Over supervised tokens: the mean of -log p, the share of those that were the likeliest, and their number.

    divergence: as in `Distillation`; None without a teacher.
    """

    loss: float
    accuracy: float
    supervised: int
    divergence: float | None = None

    @property
    def perplexity(self) -> float:
        """e to the power of the loss."""
        return perplexity(self.loss)

    def means(self) -> dict[str, float]:
        """Each figure but the number of tokens by its name."""
        found = {"loss": self.loss, "perplexity": self.perplexity, "accuracy": self.accuracy}
        return found if self.divergence is None else found | {"divergence": self.divergence}

    def as_json(self, prefix: str = "") -> dict[str, float | None]:
        """Each figure by its name after `prefix`; None if not finite."""
        found = {f"{prefix}{name}": value if math.isfinite(value) else None for name, value in self.means().items()}
        return {**found, f"{prefix}supervised": self.supervised}


class TaskReport(NamedTuple):
    """Of a task that the model was given: what is shown, and figures by name."""

    words: str
    figures: dict[str, float]


Task = Callable[[Any], TaskReport]
"""Gives a model such a task. A collective."""


@dataclass(frozen=True)
class EvaluationReport:
    """One evaluation after `step` steps, equal on all ranks: of all `documents`, and by source if there are several.

    samples: questions and the answers to them. seconds: wall time of all of it. tasks: what else the model was given.
    """

    step: int
    epoch: float
    figures: Figures
    sources: dict[str, Figures]
    documents: int
    samples: list[tuple[str, str]]
    seconds: float
    tasks: tuple[TaskReport, ...] = ()

    def lines(self) -> list[str]:
        """As it is shown."""
        when = f"after step {self.step}" if self.step else "before the first step"
        cost = f"{self.documents:,} documents, {self.figures.supervised:,} tokens, {self.seconds:.2f} s"
        found = [f"validation {when}: {_shown(self.figures)} | {cost}"]
        found += [f"  {name}: {_shown(figures)} | {figures.supervised:,} tokens"
                  for name, figures in self.sources.items()]  # fmt: skip
        found += [f"  {task.words}" for task in self.tasks]
        for question, answer in self.samples:
            found += [f"  question: {_indented(question)}", f"  answer: {_indented(answer) or '[nothing]'}"]
        return found

    def as_json(self) -> dict[str, Any]:
        """As log.jsonl has it."""
        return {
            "step": self.step, "epoch": self.epoch, **self.figures.as_json("val_"), "val_documents": self.documents,
            "val_sources": {name: figures.as_json() for name, figures in self.sources.items()},
            "samples": [{"question": question, "answer": answer} for question, answer in self.samples],
            "seconds": self.seconds, **{name: value for task in self.tasks for name, value in task.figures.items()},
        }  # fmt: skip


def perplexity(loss: float) -> float:
    """e to the power of `loss`, infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 or math.isnan(loss) else math.inf


def peak_memory(device: torch.device) -> int:
    """Bytes at the worst moment so far: allocated by PyTorch on a GPU, resident in the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count what the process that forked this one had, too
        lines = (line.split() for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        if found := next(lines, None):  # not every kernel says it
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Shows steps on the main rank and stays silent on the others. Where `output_dir` is None, nothing is written.

    What an earlier run showed in the same directory for steps after `first_step` no longer counts. trackers: get what
    is shown, too, on the main rank.
    """

    def __init__(
        self,
        output_dir: Path | None,
        total_steps: int,
        first_step: int,
        enabled: bool,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self.enabled, self.total_steps, self.trackers = enabled, total_steps, trackers
        self.output_dir = output_dir if enabled else None
        self.started, self.first_step = time.monotonic(), first_step
        if self.output_dir:
            _end_last_line(self.output_dir / LOG_FILE)
        silent = None if enabled else True
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=silent, dynamic_ncols=True)

    def say(self, text: str) -> None:
        """Print above the progress bar, on the main rank."""
        if self.enabled:
            tqdm.write(text)

    def step(self, report: StepReport) -> None:
        """Show and record one step."""
        if not self.enabled:
            return
        self.say(self.line(report))
        self.bar.update()
        values = report.values()
        entry = {name: value if math.isfinite(value) else None for name, value in values.items()}
        scalars = {f"train/{name}": values[name] for name in (*_SCALARS, *report.figures) if name in values}
        scalars["train/tokens_per_s"] = report.tokens / report.seconds
        self._record(entry, scalars | {"train/peak_gib": report.peak_bytes / 2**30})

    def evaluation(self, report: EvaluationReport) -> None:
        """Show and record an evaluation."""
        if not self.enabled:
            return
        self.say("\n".join(report.lines()))
        scalars = {f"val/{name}": value for name, value in report.figures.means().items()}
        for source, figures in report.sources.items():
            scalars |= {f"val/{name}/{source}": value for name, value in figures.means().items()}
        for task in report.tasks:
            scalars |= {f"val/{name}": value for name, value in task.figures.items()}
        self._record(report.as_json(), scalars, report.samples)

    def _record(
        self, entry: dict[str, Any], scalars: dict[str, float], samples: Sequence[tuple[str, str]] = ()
    ) -> None:
        """Append `entry` to the JSON log, and give the others to the trackers."""
        if not self.output_dir:
            return
        path = self.output_dir / LOG_FILE
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            for tracker in self.trackers:
                tracker.scalars(scalars, entry["step"])
                tracker.texts("samples", samples, entry["step"])
        except OSError as error:
            raise disk_fault(path, error) from error

    def line(self, report: StepReport) -> str:
        """The fixed-width line of a step."""
        done, total = report.step - self.first_step, max(report.step, self.total_steps)
        left = (time.monotonic() - self.started) / max(done, 1) * (total - report.step)
        parts = ""
        if taught := report.distillation:
            parts = f" | ce {_in_8(taught.cross_entropy, 4)} | kl {_in_8(taught.divergence, 4)}"
        return (
            f"step {report.step:6d}/{total} {100 * report.step / total:5.1f}% | "
            f"loss {_in_8(report.loss, 4)}{parts} | acc {report.accuracy:6.1%} | lr {report.lr:.2e} | "
            f"grad norm {_in_8(report.grad_norm, 3)} | "
            f"{report.tokens / report.seconds:8.0f} tok/s | peak {report.peak_bytes / 2**30:6.2f} GiB | "
            f"ETA {int(left) // 3600:4d}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        )

    def close(self) -> None:
        """End the bar and what trackers write, draw the loss curves."""
        self.bar.close()
        for tracker in self.trackers:
            self._attempt(tracker.close, tracker.name)
        if self.output_dir and (self.output_dir / LOG_FILE).is_file():
            self._attempt(self._draw, self.output_dir / CURVE_FILE)

    def _draw(self) -> None:
        loss_figure(read_curves(self.output_dir / LOG_FILE)).savefig(self.output_dir / CURVE_FILE, dpi=120)

    def _attempt(self, work: Callable[[], None], what: object) -> None:
        """A failure is not worth a trained model, and perhaps an effect of what ends the run: it is only told."""
        try:
            work()
        except Exception as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self.say(f"{what}: cannot be written ({reason})")


def _shown(figures: Figures) -> str:
    taught = "" if figures.divergence is None else f" | kl {figures.divergence:.4f}"
    return f"loss {figures.loss:.4f}{taught} | perplexity {figures.perplexity:.4g} | accuracy {figures.accuracy:.1%}"


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


def _in_8(value: float, decimals: int) -> str:
    """A number in 8 characters, in powers of ten where it would not fit otherwise."""
    text = f"{value:8.{decimals}f}"
    return text if len(text) <= 8 else f"{value:8.1e}"


def _end_last_line(log: Path) -> None:
    """Finish the line that a killed run left unfinished, so that the next one is not appended to it."""
    if log.is_file() and not log.read_bytes().endswith(b"\n"):
        with log.open("a", encoding="utf-8") as file:
            file.write("\n")
