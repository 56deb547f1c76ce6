"""A small job on two ranks that faults strike, and what to ask of it and its processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from accessory.run.status import read_status

WORKER = Path(__file__).with_name("faulty_worker.py")
ROOT = Path(__file__).resolve().parent.parent.parent
LLAMA_TYPE = os.environ.get("FAULTS_STRIKE", "llama_peft")
"""What is trained while faults strike; `FAULTS_STRIKE=llama_qst pytest tests/faults` strikes side tuning."""
SIZE = "r" if LLAMA_TYPE.endswith("_qst") else "lora_rank"
"""The setting that says how large the trained part is."""
STEPS = 12
PATIENCE = 200  # seconds until a job is taken to hang
START = 8.0  # seconds on two idle cores from a job's start to its first steps
FORCED = "forcefully exiting via"
"""Torchrun says so where a rank has not left half a minute after SIGTERM."""


def settings(size: int = 4, dropout: float = 0.0) -> str:
    """The JSON of a small LoRA or side network. Without `dropout`, nothing is drawn."""
    side = {"r": size, "side_heads": 2, "dropout": dropout, "label_share": 0.5 if dropout else 1}
    return json.dumps(side if SIZE == "r" else {"lora_rank": size, "lora_dropout": dropout})


@dataclass
class Job:
    """A run of `STEPS` steps of 8 documents on `ranks` processes: LoRA with dropout beside NF4, AdamW, cosine."""

    base: Path
    method: Path
    output: Path
    environment: dict[str, str]
    ranks: int = 2
    launcher: list[str] = field(default_factory=list)
    started: float = 0.0
    seconds: float = 0.0

    def flags(self, *more: str) -> list[str]:
        """Of `main_finetune.py`; those given last win."""
        return [
            *("--pretrained_path", str(self.base), "--llama_type", LLAMA_TYPE, "--llama_config", str(self.method)),
            *("--data_config", str(ROOT / "data_example" / "accessory_qa.json"), "--max_words", "160"),
            *("--device", "cpu", "--quant", "--only_save_trainable", "--batch_size", "2"),
            *("--accum_iter", str(4 // self.ranks), "--epochs", "2", "--warmup_epochs", "0.2", "--lr", "0.01"),
            *("--max_steps", str(STEPS), "--save_steps", "4", "--output_dir", str(self.output), *more),
        ]

    def start(
        self, *more: str, faults: list[dict] | None = None, script: Path | None = None, **variables: str
    ) -> subprocess.Popen:
        """Under torchrun, in a session of its own. `script` takes the worker's place."""
        self.fired_in.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        settings = {"FAULTS": json.dumps(faults or []), "FIRED": str(self.fired_in)}
        return subprocess.Popen(
            [*command, *self.launcher, str(script or WORKER), *self.flags(*more)],
            env=self.environment | settings | variables, cwd=ROOT, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *more: str, **given) -> subprocess.CompletedProcess:
        """As `start`, to its end; `seconds`, here and on the result, says how long it took."""
        began = time.monotonic()
        done = finish(self.start(*more, **given))
        self.seconds = done.seconds = time.monotonic() - began
        return done

    @property
    def fired_in(self) -> Path:
        """Where faults leave word."""
        return self.output.with_name(self.output.name + "-fired")

    @property
    def fired(self) -> list[str]:
        """The faults that struck."""
        return sorted(path.name for path in self.fired_in.iterdir())

    @property
    def pace(self) -> float:
        """How many times as long as on idle cores the first fault took to come; limits on time are stretched by it."""
        return max(1.0, (min(path.stat().st_mtime for path in self.fired_in.iterdir()) - self.started) / START)

    @property
    def status(self) -> dict:
        """What run_status.json says."""
        return read_status(self.output)

    @property
    def losses(self) -> dict[int, float]:
        """Loss of each step; where one was taken again, that of the last time."""
        lines = [json.loads(line) for line in (self.output / "log.jsonl").read_text().splitlines()]
        return {line["step"]: line["loss"] for line in lines}

    def digest(self, checkpoint: str) -> dict[str, str]:
        """SHA-256 of the trained part and of the training state."""
        files = ("trainable.safetensors", "training_state.safetensors")
        return {name: hashlib.sha256((self.output / checkpoint / name).read_bytes()).hexdigest() for name in files}


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for the end of a job and of all it started."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"hung for {PATIENCE} s:\n{out[-2000:]}{err[-2000:]}")
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def said(done: subprocess.CompletedProcess) -> str:
    """What our own processes wrote, without torchrun's report that follows."""
    return done.stderr.split("torch/distributed/elastic")[0]


def wait_for(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    """Until it is true, or the test fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def workers_of(launcher: int) -> list[int]:
    """Processes started by `launcher` that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = stat.read_text().rsplit(")", 1)
        except OSError:
            continue
        state, parent = rest.split()[:2]
        if int(parent) == launcher and state != "Z":
            found.append(int(name.split()[0]))
    return sorted(found)


def alive(process: int) -> bool:
    """Whether it runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
