"""What a run shows: a progress bar, a line a step, TensorBoard, a JSON log (null: not finite), and the loss curve."""

from __future__ import annotations

import json
import math
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from accessory.checkpoint.disk_space import disk_fault

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOG_FILE = "log.jsonl"
CURVE_FILE = "loss.png"


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, equal on all ranks. A skipped one may have a `loss` and `grad_norm` that are not finite.

    `tokens` are real ones of the global batch, `seconds` wall time.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    supervised: int
    seconds: float
    peak_bytes: int


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

    What an earlier run showed in the same directory for steps after `first_step` no longer counts.
    """

    def __init__(self, output_dir: Path | None, total_steps: int, first_step: int, enabled: bool) -> None:
        self.enabled, self.total_steps = enabled, total_steps
        self.output_dir = output_dir if enabled else None
        self.started, self.first_step = time.monotonic(), first_step
        if self.output_dir:
            _end_last_line(self.output_dir / LOG_FILE)
            _leave_second_of_older_events(self.output_dir)
        self.writer = SummaryWriter(str(output_dir), purge_step=first_step + 1) if self.output_dir else None
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
        if self.output_dir:
            try:
                self._record(report)
            except OSError as error:
                raise disk_fault(self.output_dir / LOG_FILE, error) from error

    def line(self, report: StepReport) -> str:
        """The fixed-width line of a step."""
        done, total = report.step - self.first_step, max(report.step, self.total_steps)
        left = (time.monotonic() - self.started) / max(done, 1) * (total - report.step)
        return (
            f"step {report.step:6d}/{total} {100 * report.step / total:5.1f}% | "
            f"loss {_in_8(report.loss, 4)} | lr {report.lr:.2e} | grad norm {_in_8(report.grad_norm, 3)} | "
            f"{report.tokens / report.seconds:8.0f} tok/s | peak {report.peak_bytes / 2**30:6.2f} GiB | "
            f"ETA {int(left) // 3600:4d}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        )

    def _record(self, report: StepReport) -> None:
        entry = {name: value if math.isfinite(value) else None for name, value in asdict(report).items()}
        with (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for name in ("loss", "lr", "grad_norm", "epoch"):
            self.writer.add_scalar(f"train/{name}", getattr(report, name), report.step)
        self.writer.add_scalar("train/tokens_per_s", report.tokens / report.seconds, report.step)
        self.writer.add_scalar("train/peak_gib", report.peak_bytes / 2**30, report.step)

    def close(self) -> None:
        """End the bar, flush TensorBoard, draw the loss curve."""
        self.bar.close()
        if not self.output_dir:
            return
        try:
            self.writer.close()
            if (self.output_dir / LOG_FILE).is_file():
                loss_figure(read_losses(self.output_dir / LOG_FILE)).savefig(self.output_dir / CURVE_FILE, dpi=120)
        except Exception as error:  # not worth a trained model, and perhaps an effect of what ends the run
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            self.say(f"{self.output_dir / CURVE_FILE}: cannot be written ({reason})")


def _in_8(value: float, decimals: int) -> str:
    """A number in 8 characters, in powers of ten where it would not fit otherwise."""
    text = f"{value:8.{decimals}f}"
    return text if len(text) <= 8 else f"{value:8.1e}"


def _end_last_line(log: Path) -> None:
    """Finish the line that a killed run left unfinished, so that the next one is not appended to it."""
    if log.is_file() and not log.read_bytes().endswith(b"\n"):
        with log.open("a", encoding="utf-8") as file:
            file.write("\n")


def _leave_second_of_older_events(directory: Path) -> None:
    """Wait, a second at most, until a new event file's name has a later second than those in `directory`.

    TensorBoard reads event files in the order of their names: second, host, process, count; the last two as text, by
    which "10" comes before "9".
    """
    seconds = {path.name.split(".")[3] for path in directory.glob("events.out.tfevents.*")}
    while str(int(time.time())) in seconds:
        time.sleep(0.05)


def read_losses(log: Path) -> dict[int, float]:
    """Loss by step from a JSON log, in order.

    Where a resumed run wrote a step again, what the earlier run wrote from there on is dropped. A line that a killed
    run left unfinished is passed over.
    """
    losses: dict[int, float] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if losses and entry["step"] <= next(reversed(losses)):
            losses = {step: loss for step, loss in losses.items() if step < entry["step"]}
        losses[entry["step"]] = math.nan if entry["loss"] is None else entry["loss"]
    return losses


def loss_figure(losses: dict[int, float]) -> Figure:
    """The loss curve, steps marked by whole numbers however few they are."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), layout="tight")
    axes = figure.subplots()
    axes.plot(losses.keys(), losses.values(), linewidth=1.2, marker="." if len(losses) == 1 else None)
    axes.set(xlabel="step", ylabel="loss per supervised token", title="training loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    return figure
