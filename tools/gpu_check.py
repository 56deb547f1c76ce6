"""Check on a GPU all that can be checked only there, and measure it, in less than eight minutes on one H200:

    python tools/gpu_check.py --out gpu.jsonl               (once more with the same file: what has not passed yet)
    python tools/gpu_check.py --list
    python tools/gpu_check.py --only kernels,attention      (rooms or single checks)
    python tools/gpu_check.py --tiny                        (on a CPU: what needs CUDA is rehearsed, and skipped)

Checks run in a process of their own, which is started again after a crash or where a check takes too long. Each ends
in a line of JSON in --out; the last line is the summary. Exit status: 0 all passed, or skipped for what this machine
lacks; 1 something failed; 2 it could not run; 3 nothing failed, but there was no time for something.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORKER = ROOT / "tools" / "gpu_checks" / "worker.py"
STARTED_IN = 120.0  # seconds within which a worker must have started
SLACK, TIMES = 20.0, 4.0  # a check may take TIMES times as long as it should, and SLACK seconds more
KERNELS = "kernels."
"""Checks of Triton's kernels, which run on a CPU in Triton's interpreter, in a worker of their own."""
Line = dict[str, Any]


@dataclass
class Worker:
    """The process of `tools/gpu_checks/worker.py`. log: its output file. interpreted: whether Triton's kernels are."""

    device: str
    tiny: bool
    log: Path
    interpreted: bool = False
    script: Path = WORKER
    checks: list[Line] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    unusable: str = ""

    def __post_init__(self) -> None:
        reader, writer = os.pipe()
        environment = {
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS reads it once, and some checks fix the order of sums
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
        }
        if self.tiny:
            environment.setdefault("OMP_NUM_THREADS", "1")  # with such small sizes, threads cost more than they save
        if self.interpreted:
            environment["TRITON_INTERPRET"] = "1"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(self.script), str(writer), self.device, "tiny" if self.tiny else "full"],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[writer], cwd=ROOT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        self._answers, self._begun = os.fdopen(reader, "rb", buffering=0), b""
        told = self.answer(STARTED_IN)
        if told is None:
            told = {"unusable": f"the worker did not start; the end of {self.log}:\n{self.words()}"}
        self.checks, self.broken = told.get("checks", []), told.get("broken", {})
        self.unusable = told.get("unusable", "")

    def ask(self, name: str, seconds: float) -> Line | None:
        """Run the check `name`; None if it took longer, or the process ended."""
        try:
            self.process.stdin.write(f"{name}\n".encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        return self.answer(seconds)

    def answer(self, seconds: float) -> Line | None:
        """The next line; None if there is none within `seconds`, or the process ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._begun:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                return None
            piece = os.read(self._answers.fileno(), 1 << 16)
            if not piece:
                return None
            self._begun += piece
        line, _, self._begun = self._begun.partition(b"\n")
        return json.loads(line)

    def words(self) -> str:
        """The end of what it printed."""
        return self.log.read_bytes()[-1500:].decode(errors="replace").strip()

    def stop(self) -> None:
        """End it, and all that it started."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(3)
        except subprocess.TimeoutExpired:
            self._kill()
        self._answers.close()

    def _kill(self) -> None:
        try:
            os.killpg(self.process.pid, 9)
        except ProcessLookupError:
            return
        self.process.wait()

    def ended(self) -> int | None:
        """The status it ended with; None: it runs. One that has closed its answers is about to end."""
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None


@dataclass
class Session:
    """One call of this tool. named: what --only names. lines: what was found before, or is now, by the check's name."""

    device: str
    tiny: bool
    out: Path | None
    log: Path
    deadline: float
    script: Path = WORKER
    named: tuple[str, ...] = ()
    lines: dict[str, Line] = field(default_factory=dict)
    worker: Worker | None = None

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    def run(self, checks: list[Line]) -> None:
        """Run those that have not passed before; `left_out` are those there is no time for."""
        ordered = sorted(checks, key=lambda one: not self.interprets(one["name"]))
        for beside, group in groupby(ordered, lambda one: one.get("beside", False)):
            wanted = filter(self._wants, group)
            if beside:
                self._run_together(list(wanted))
                continue
            for one in wanted:
                began = time.monotonic()
                self.note(one["name"], self._run(one), time.monotonic() - began)

    def _wants(self, one: Line) -> bool:
        """Whether a check shall run now; why not is noted."""
        name, answer = one["name"], None
        if self.lines.get(name, {}).get("status") == "passed":
            print(f"{'passed before':<14}{name}", flush=True)
            return False
        if one.get("by_name") and self.device == "cpu" and name not in self.named:
            words = "needs CUDA; takes long to rehearse, which --only with its name does"
            answer = {"status": "skipped", "message": words}
        elif one["seconds"] > self.left:
            answer = {"status": "left_out", "message": f"{self.left:.0f} s were left"}
        if answer:
            self.note(name, answer, 0.0)
        return answer is None

    def _run(self, one: Line) -> Line:
        """Run a check in the worker, which is started where there is none."""
        interpreted = self.interprets(one["name"])
        if self.worker and (self.worker.process.poll() is not None or self.worker.interpreted != interpreted):
            self.close()
        if self.worker is None:
            self.worker = self.new_worker(interpreted)
        answer, usable = self._ask(self.worker, one)
        if not usable:
            self.close()
        return answer

    def _run_together(self, checks: list[Line]) -> None:
        """Run them at the same time, each in a worker of its own."""

        def alone(one: Line) -> tuple[Line, float]:
            """What a check finds, and its seconds."""
            began, worker = time.monotonic(), self.new_worker()
            try:
                return self._ask(worker, one)[0], time.monotonic() - began
            finally:
                worker.stop()

        with ThreadPoolExecutor(max(len(checks), 1)) as pool:
            for one, found in zip(checks, pool.map(alone, checks), strict=True):
                self.note(one["name"], *found)

    def _ask(self, worker: Worker, one: Line) -> tuple[Line, bool]:
        """(what a check finds, whether the worker can be asked again)."""
        if worker.unusable:
            return {"status": "failed", "message": f"no worker: {worker.unusable}"}, True
        limit = min(SLACK + TIMES * one["seconds"], max(self.left, one["seconds"]))
        answer = worker.ask(one["name"], limit)
        if answer is not None:
            return answer, not answer.pop("lost", False)
        status, words = worker.ended(), worker.words()
        said = f"took more than {limit:.0f} s" if status is None else f"the process ended with {status}"
        return {"status": "failed", "message": f"{said}; it said last:\n{words}"}, False

    def interprets(self, name: str) -> bool:
        """Whether that check needs Triton's interpreter here."""
        return self.device == "cpu" and name.startswith(KERNELS)

    def new_worker(self, interpreted: bool = False) -> Worker:
        """A new process."""
        return Worker(self.device, self.tiny, self.log, interpreted, self.script)

    def note(self, name: str, answer: Line, seconds: float) -> None:
        """Print what a check found, and write it down."""
        line = {"check": name, **answer, "seconds": round(seconds, 2), "device": self.device, "tiny": self.tiny}
        self.lines[name] = line
        figures = ", ".join(f"{key} {value}" for key, value in line.get("figures", {}).items())
        print(f"{line['status']:<14}{name} ({seconds:.1f} s) {figures}", flush=True)
        if line["message"]:
            print("".join(f"{'':<14}{each}\n" for each in line["message"].splitlines()), end="", flush=True)
        self.write(line)

    def write(self, line: Line) -> None:
        """Append it to the file, if there is one."""
        if self.out:
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """End the worker."""
        if self.worker:
            self.worker.stop()
            self.worker = None


def main(words: list[str]) -> int:
    """Run the checks that the command line asks for; the exit status."""
    began, asked = time.monotonic(), _parser().parse_args(words)
    device = asked.device or ("cpu" if asked.tiny else "cuda")
    with TemporaryDirectory() as aside:
        log = Path(f"{asked.out}.log") if asked.out else Path(aside, "log")
        session = Session(device, asked.tiny, asked.out, log, began + 60 * asked.minutes)
        session.named = tuple(asked.only.split(","))
        return _run(session, asked, began)


def _run(session: Session, asked: argparse.Namespace, began: float) -> int:
    """Choose, run, summarize; the exit status."""
    session.worker = session.new_worker(session.interprets(KERNELS))
    try:
        if session.worker.unusable:
            print(f"{session.worker.unusable}\nOn a CPU: python tools/gpu_check.py --tiny", file=sys.stderr)
            return 2
        checks = [
            *session.worker.checks,
            *({"name": name, "seconds": 0, "beside": False} for name in session.worker.broken),
        ]
        chosen = _chosen(checks, asked.only)
        if isinstance(chosen, str):
            print(chosen, file=sys.stderr)
            return 2
        if asked.list:
            print("\n".join(f"{one['name']:<34} about {one['seconds']:.0f} s" for one in chosen))
            print(f"about {stated_seconds(chosen):.0f} s in all")
            return 0
        session.lines = _found_before(session)
        for name, fault in session.worker.broken.items():
            session.note(name, {"status": "failed", "message": fault}, 0.0)
        session.run([one for one in chosen if one["name"] not in session.worker.broken])
    finally:
        session.close()
    return _summarize(session, [one["name"] for one in chosen], time.monotonic() - began)


def stated_seconds(checks: list[Line]) -> float:
    """About what they take on an H200; neighbours that run beside each other take as long as the longest."""
    groups = groupby(checks, lambda one: one["beside"])
    return sum((max if beside else sum)(one["seconds"] for one in group) for beside, group in groups)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file of JSON lines; checks that passed in it are not run again")
    parser.add_argument("--only", default="", help="names of rooms or checks, with commas between them")
    parser.add_argument("--list", action="store_true", help="print the checks in their order")
    parser.add_argument("--minutes", type=float, default=8.0, help="no check begins that would end later")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda; with --tiny: cpu")
    return parser


def _chosen(checks: list[Line], only: str) -> list[Line] | str:
    """Those that `only` names, in their order, or what is wrong with it."""
    names = [name for name in only.split(",") if name]
    rooms = {one["name"].partition(".")[0] for one in checks}
    known = [*sorted(rooms), *(one["name"] for one in checks)]
    for name in names:
        if name not in known:
            near = get_close_matches(name, known, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            return f"--only {name}: no room or check is called so.{hint} --list prints all."
    return [one for one in checks if not names or {one["name"], one["name"].partition(".")[0]} & set(names)]


def _found_before(session: Session) -> dict[str, Line]:
    """The last line of each check in the file, of this kind of run; a line that was cut off is none."""
    found, out = {}, session.out
    for text in out.read_text(encoding="utf-8").splitlines() if out and out.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if "check" in line and (line["device"], line["tiny"]) == (session.device, session.tiny):
            found[line["check"]] = line
    return found


def _summarize(session: Session, names: list[str], seconds: float) -> int:
    """Print and write the last line; the exit status."""
    by_status: dict[str, list[str]] = {}
    for name in names:
        by_status.setdefault(session.lines[name]["status"], []).append(name)
    counts = Counter({status: len(found) for status, found in by_status.items()})
    unclear = {status: found for status, found in by_status.items() if status in ("failed", "left_out")}
    session.write({"summary": counts, **unclear, "seconds": round(seconds, 1)})
    print(f"{', '.join(f'{count} {status}' for status, count in counts.items())} in {seconds:.0f} s")
    return 1 if counts["failed"] else 3 if counts["left_out"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
