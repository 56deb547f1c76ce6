"""What a run shows: a progress bar, a line a step, TensorBoard, a JSON log, and the loss curve."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

LOG_FILE = "log.jsonl"
CURVE_FILE = "loss.png"


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, equal on all ranks. `tokens` are real ones of the global batch, `seconds` wall time."""

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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Reporter:
    """Shows steps on the main rank and stays silent on the others. `output_dir` may be None: then nothing is written."""

    def __init__(self, output_dir: Path | None, total_steps: int, first_step: int, enabled: bool) -> None:
        self.enabled, self.total_steps = enabled, total_steps
        self.output_dir = output_dir if enabled else None
        self.started, self.first_step = time.monotonic(), first_step
        self.writer = SummaryWriter(str(output_dir)) if self.output_dir else None
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=None if enabled else True, dynamic_ncols=True)

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
            with (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(report)) + "\n")
            self._tensorboard(report)

    def line(self, report: StepReport) -> str:
        """The fixed-width line of a step."""
        done = report.step - self.first_step
        left = (time.monotonic() - self.started) / max(done, 1) * (self.total_steps - report.step)
        return (
            f"step {report.step:6d}/{self.total_steps} {100 * report.step / self.total_steps:5.1f}% | "
            f"loss {report.loss:8.4f} | lr {report.lr:.2e} | grad norm {report.grad_norm:8.3f} | "
            f"{report.tokens / report.seconds:8.0f} tok/s | peak {report.peak_bytes / 2**30:6.2f} GiB | "
            f"ETA {int(left) // 3600:d}:{int(left) // 60 % 60:02d}:{int(left) % 60:02d}"
        )

    def _tensorboard(self, report: StepReport) -> None:
        for name in ("loss", "lr", "grad_norm", "epoch"):
            self.writer.add_scalar(f"train/{name}", getattr(report, name), report.step)
        self.writer.add_scalar("train/tokens_per_s", report.tokens / report.seconds, report.step)
        self.writer.add_scalar("train/peak_gib", report.peak_bytes / 2**30, report.step)

    def close(self) -> None:
        """End the bar, flush TensorBoard, draw the loss curve."""
        self.bar.close()
        if self.writer:
            self.writer.close()
        if self.output_dir and (self.output_dir / LOG_FILE).is_file():
            draw_loss_curve(self.output_dir / LOG_FILE, self.output_dir / CURVE_FILE)


def draw_loss_curve(log: Path, picture: Path) -> None:
    """Draw loss over steps from a JSON log into a PNG. A resumed run's later entry for a step replaces the earlier."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    losses = {entry["step"]: entry["loss"] for entry in entries}
    figure, axes = plt.subplots(figsize=(8, 4.5))
    axes.plot(sorted(losses), [losses[step] for step in sorted(losses)], linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss per supervised token", title="training loss")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
