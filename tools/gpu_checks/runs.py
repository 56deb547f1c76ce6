"""Whole runs as users start them, under torchrun with one rank: NCCL, signals, memory that runs out, recomputation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from accessory.errors import LostRankError, OutOfMemoryError
from accessory.run.status import read_status
from tools import random_checkpoint
from tools.gpu_checks.check import Findings, Ground, check

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data_example" / "accessory_qa.json"
PATIENCE = 100.0  # seconds that a run may take
ENDS_IN = 20.0  # seconds after a failure
SHAPE = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}  # fmt: skip


class Bench:
    """A folder with a small checkpoint, and runs on it."""

    def __init__(self, folder: Path, ground: Ground, shape: dict) -> None:
        self.folder, self.ground = folder, ground
        (folder / "shape.json").write_text(json.dumps(shape))
        random_checkpoint.main(str(folder / "base"), str(folder / "shape.json"), dtype="bf16")
        (folder / "lora.json").write_text('{"lora_rank": 4}')
        self.started: list[subprocess.Popen] = []

    def start(self, name: str, *flags: str, script: str = "", ranks: int = 1) -> subprocess.Popen:
        """Train into the folder `name`, on so many ranks. script: Python to be run before the entry."""
        entry = ROOT / "accessory" / "main_finetune.py"
        if script:
            ours = self.folder / f"{name}.py"
            ours.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{script}\n"
                            f"import runpy\nrunpy.run_path({str(entry)!r}, run_name='__main__')\n")  # fmt: skip
            entry = ours
        device = self.ground.device.type
        words = [
            *("--pretrained_path", self.folder / "base", "--llama_type", "llama_peft"),
            *("--llama_config", self.folder / "lora.json", "--data_config", DATA, "--max_words", "320"),
            *("--quant", "--only_save_trainable", "--batch_size", "4", "--epochs", "60", "--lr", "0.01"),
            *("--device", device, "--report_to", "none", "--output_dir", self.folder / name, *flags),
        ]
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *launcher, str(entry), *map(str, words)], cwd=ROOT, env=_environment(),
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def finish(self, name: str, process: subprocess.Popen, seconds: float = PATIENCE) -> int | None:
        """The launcher's status; None if the run took longer, and was killed."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return None

    def words(self, name: str) -> str:
        """All that a run printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def status(self, name: str) -> dict:
        """What run_status.json says."""
        return read_status(self.folder / name)

    def losses(self, name: str) -> dict[int, float]:
        """Of each step; where one was taken again, that of the last time."""
        file = self.folder / name / "log.jsonl"
        if not file.is_file():
            return {}
        lines = [line for line in file.read_text().split("\n")[:-1] if line]  # the last line may be half written
        return {line["step"]: line["loss"] for line in map(json.loads, lines) if "loss" in line}


@contextmanager
def _bench(ground: Ground, shape: dict = SHAPE) -> Iterator[Bench]:
    """A bench whose runs are killed, if they have not ended, and whose folder is removed at the end."""
    with TemporaryDirectory() as folder:
        bench = Bench(Path(folder), ground, shape)
        try:
            yield bench
        finally:
            for process in bench.started:
                if process.poll() is None:
                    _kill(process)


def _environment() -> dict[str, str]:
    """Without the variables of a process group that this process is in, and those that a run sets itself."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET",
            "PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG")  # fmt: skip
    return {name: value for name, value in os.environ.items() if name not in ours} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        "OMP_NUM_THREADS": "1",
    }


def _kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@check(35, by_name=True, beside=True)
def stopped_and_resumed(ground: Ground, found: Findings) -> None:
    """SIGTERM to the launcher between two steps: all is saved, and the resumed run ends as one that was not stopped.

    With `--deterministic`, to the last digit.
    """
    steps = ground.pick(240, 40)  # more steps than can be taken before the signal arrives
    flags = ("--max_steps", str(steps), "--save_steps", str(steps), *(("--deterministic",) if ground.cuda else ()))
    with _bench(ground) as bench:
        stopped, whole = bench.start("stopped", *flags), bench.start("whole", *flags)
        deadline = time.monotonic() + PATIENCE
        while len(bench.losses("stopped")) < 3 and stopped.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        stopped.send_signal(signal.SIGTERM)
        began = time.monotonic()
        left = bench.finish("stopped", stopped)
        found.figures["stopped_in_s"] = round(time.monotonic() - began, 1)
        status = bench.status("stopped")
        found.figures["stopped_after_step"] = status.get("step")
        preempted = (status.get("state"), status.get("status")) == ("preempted", 75)
        found.expect(preempted and left, f"after SIGTERM: {left}, {status}; {bench.words('stopped')[-1500:]}")
        resumed = bench.finish("stopped", bench.start("stopped", *flags, "--resume", "latest"))
        found.expect(resumed == 0, f"the resumed run ended with {resumed}: {bench.words('stopped')[-1500:]}")
        ended = bench.finish("whole", whole)
        found.expect(ended == 0, f"the whole run ended with {ended}: {bench.words('whole')[-1500:]}")
        mine, wanted = bench.losses("stopped"), bench.losses("whole")
        found.expect(len(wanted) == steps, f"the whole run took {len(wanted)} steps")
        other = [step for step in wanted if mine.get(step) != wanted[step]]
        found.expect(
            not other, f"losses differ from step {other[:1]} on: {[(mine.get(s), wanted[s]) for s in other[:2]]}"
        )
        found.expect(wanted.get(steps, 9) < wanted.get(1, 0), f"the loss did not fall: {wanted}")


@check(16, needs_cuda=True, by_name=True, beside=True)
def recomputed_and_offloaded(ground: Ground, found: Findings) -> None:
    """`--checkpointing auto` and all, and `--offload_inputs`: the losses of the run that keeps everything."""
    flags = ("--max_steps", "8", *(("--deterministic",) if ground.cuda else ()))
    kinds = {"kept": (), "auto": ("--checkpointing", "auto"), "all": ("--checkpointing", "all")}
    if ground.cuda:
        kinds["offloaded"] = ("--checkpointing", "all", "--offload_inputs")
    else:
        del kinds["all"]
    with _bench(ground) as bench:
        started = {name: bench.start(name, *flags, *more) for name, more in kinds.items()}
        ended = {name: bench.finish(name, process) for name, process in started.items()}
        for name, status in ended.items():
            found.expect(status == 0, f"{name} ended with {status}: {bench.words(name)[-1500:]}")
            found.expect(bench.losses(name) == bench.losses("kept"), f"{name}: losses are {bench.losses(name)}")
        found.expect(len(bench.losses("kept")) == 8, f"losses are {bench.losses('kept')}")


_LITTLE_MEMORY = "import torch\ntorch.cuda.set_per_process_memory_fraction({share})"
_NO_MEMORY = """
import torch
from accessory.meta import MetaModel
right, calls = MetaModel.forward, []
def forward(*given):
    calls.append(1)
    if len(calls) > 2:
        raise torch.OutOfMemoryError("CUDA out of memory, for a rehearsal")
    return right(*given)
MetaModel.forward = forward
"""


@check(15, needs_cuda=True, by_name=True, beside=True)
def out_of_memory(ground: Ground, found: Findings) -> None:
    """A process that may take little of the card: the run ends with one line that says what would help."""
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 8}
    script = _NO_MEMORY
    if ground.cuda:
        total = torch.cuda.mem_get_info(ground.device)[1]
        script = _LITTLE_MEMORY.format(share=400e6 / total)
    with _bench(ground, SHAPE | wide if ground.cuda else SHAPE) as bench:
        began = time.monotonic()
        flags = ("--batch_size", ground.pick("64", "4"), "--max_steps", "4")
        left = bench.finish("small", bench.start("small", *flags, script=script))
        found.figures["ended_in_s"] = round(time.monotonic() - began, 1)
        status, words = bench.status("small"), bench.words("small")
        told = status.get("reason") == "OutOfMemoryError" and status.get("status") == OutOfMemoryError.status
        found.expect(left and told, f"{left}, {status}: {words[-1500:]}")
        found.expect("Less memory is needed with" in words, f"no remedy is named: {words[-1500:]}")


_FAILS = """
from accessory.meta import MetaModel
right, calls = MetaModel.forward, []
def forward(*given):
    calls.append(1)
    if len(calls) > 2:
        if {cuda}:
            import torch
            torch.cuda._sleep(60_000_000_000)  # half a minute of work on the card, for which nobody waits
        open({mark!r}, "w").close()
        raise KeyError("a fault of the program")
    return right(*given)
MetaModel.forward = forward
"""


@check(15, needs_cuda=True, by_name=True, beside=True)
def failure(ground: Ground, found: Findings) -> None:
    """A fault of the program in a step, with work on its way on the card: the process ends soon, and says why."""
    with _bench(ground) as bench:
        mark = bench.folder / "failed"
        process = bench.start("failing", "--max_steps", "4", script=_FAILS.format(mark=str(mark), cuda=ground.cuda))
        left = bench.finish("failing", process)
        status, words = bench.status("failing"), bench.words("failing")
        found.expect(left and status.get("state") == "failed", f"{left}, {status}: {words[-1500:]}")
        found.expect("a fault of the program" in str(status.get("message")), f"the status says {status}")
        if mark.is_file():
            found.figures["ended_in_s"] = round(time.time() - mark.stat().st_mtime, 1)
            found.expect(found.figures["ended_in_s"] < ENDS_IN, "it took too long to end")


_DIES = """
import os
from accessory.meta import MetaModel
right, calls = MetaModel.forward, []
def forward(*given):
    calls.append(1)
    if len(calls) > 2 and os.environ["RANK"] == "1":
        open({mark!r}, "w").close()
        os.kill(os.getpid(), 9)
    return right(*given)
MetaModel.forward = forward
"""


@check(20, needs_cuda=True, by_name=True, beside=True)
def two_ranks(ground: Ground, found: Findings) -> None:
    """One that dies is told by the other, which ends soon, though NCCL waits for ever; on one card two are refused."""
    with _bench(ground) as bench:
        mark = bench.folder / "died"
        process = bench.start("two", "--max_steps", "40", script=_DIES.format(mark=str(mark)), ranks=2)
        left = bench.finish("two", process)
        status, words = bench.status("two"), bench.words("two")
        if ground.cuda and torch.cuda.device_count() == 1:
            found.expect(left and "Ranks 0 and 1 have the same GPU" in words, f"{left}: {words[-1500:]}")
            return
        lost = (status.get("state"), status.get("status")) == ("failed", LostRankError.status)
        found.expect(left and lost, f"{left}, {status}: {words[-1500:]}")
        if mark.is_file():
            found.figures["ended_in_s"] = round(time.time() - mark.stat().st_mtime, 1)
            found.expect(found.figures["ended_in_s"] < 2 * ENDS_IN, "it took too long to end")


CHECKS = [stopped_and_resumed, recomputed_and_offloaded, out_of_memory, failure, two_ranks]
