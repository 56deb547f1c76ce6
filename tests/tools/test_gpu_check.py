"""tools/gpu_check.py on a CPU: every check runs, each can fail, and none takes another with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from accessory import kernels
from accessory.kernels.plain import document_attention
from accessory.parallel.groups import Layout
from accessory.quant.four_bit import FourBitWeight
from tools import gpu_check
from tools.gpu_checks import attention, compiling, runs, storages, worker
from tools.gpu_checks.check import Check, Findings, Ground

pytestmark = pytest.mark.slow
CPU = Ground(Layout(), tiny=True)
STARTS = 30
"""Seconds for the start of the processes that run checks."""


def lines(path: Path) -> list[dict]:
    """What is in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("rooms", [["kernels"], [room for room in worker.ROOMS if room != "kernels"]], ids=len)
def test_all_of_it_tiny(called: Callable, tmp_path: Path, rooms: list[str]) -> None:
    """Nothing fails; what needs CUDA is rehearsed and does not count as passed; the summary comes last."""
    done = called("tools/gpu_check.py", "--tiny", "--out", tmp_path / "out.jsonl", "--only", ",".join(rooms))
    assert done.returncode == 0, done.stdout[-5000:]
    *found, last = lines(tmp_path / "out.jsonl")
    assert {line["check"].partition(".")[0] for line in found} == set(rooms)
    for line in found:
        skipped = line["status"] == "skipped" and line["message"].startswith("needs ")
        assert skipped or line["status"] == "passed", line
    assert sum(last["summary"].values()) == len(found)


def test_what_passed_is_not_run_again(called: Callable, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(json.dumps({"check": "storages.packing", "status": "passed", "device": "cpu", "tiny": True}) + "\n")
    again = called("tools/gpu_check.py", "--tiny", "--out", out, "--only", "storages.packing,environment.versions")
    assert "passed before storages.packing\n2 passed in " in again.stdout
    assert [line.get("check") for line in lines(out)] == ["storages.packing", "environment.versions", None]


def test_a_run_that_fails() -> None:
    """A whole run under torchrun."""
    assert faults(runs.failure) == []


@pytest.fixture
def session(tmp_path: Path) -> Callable[..., gpu_check.Session]:
    """A session whose worker crashes, hangs or says what it is asked for, as the check's name says."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys, time\n"
        "out = os.fdopen(int(sys.argv[1]), 'w', buffering=1)\n"
        "out.write(json.dumps({'checks': []}) + '\\n')\n"
        "for line in sys.stdin:\n"
        "    print('was asked for', line, flush=True)\n"
        "    if line == 'crash\\n': os.abort()\n"
        "    if line == 'hang\\n': time.sleep(600)\n"
        "    lost = line == 'lost\\n'\n"
        "    out.write(json.dumps({'status': line.strip(), 'message': '', 'lost': lost}) + '\\n')\n"
        "    if lost: break\n"
    )

    def make(seconds: float = 60.0, out: Path | None = None) -> gpu_check.Session:
        """With so much time."""
        return gpu_check.Session("cpu", True, out, tmp_path / "log", time.monotonic() + seconds, script)

    return make


def test_a_crash_and_a_hang_fail_alone(session: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next check runs in a new process, also after one that lost the device."""
    monkeypatch.setattr(gpu_check, "SLACK", 1.0)
    one = session()
    one.run([{"name": name, "seconds": 0.1} for name in ("passed", "crash", "hang", "failed", "lost", "passed ")])
    one.close()
    assert {name: line["status"] for name, line in one.lines.items()} == {
        "passed": "passed", "crash": "failed", "hang": "failed", "failed": "failed", "lost": "lost",
        "passed ": "passed",
    }  # fmt: skip
    assert one.lines["crash"]["message"].startswith("the process ended with -6; it said last:\nwas asked for passed")
    assert one.lines["hang"]["message"].startswith("took more than 1 s; it said last:")


def test_those_that_measure_nothing_run_at_the_same_time(session: Callable) -> None:
    """Each in its own process: the crash of one is not the others'; all together take as long as the longest."""
    one = session()
    names = ("first", "crash", "second", "third")
    one.run([{"name": name, "seconds": 5, "beside": name != "third"} for name in names])
    one.close()
    assert [line["status"] for line in one.lines.values()] == ["first", "failed", "second", "third"]
    checks = [{"seconds": seconds, "beside": seconds > 2} for seconds in (1, 30, 4, 2)]
    assert gpu_check.stated_seconds(checks) == 1 + 30 + 2


def test_all_of_it_takes_less_than_eight_minutes() -> None:
    """By what the checks themselves state, with the start of processes."""
    rooms = [import_module(f"tools.gpu_checks.{room}").CHECKS for room in worker.ROOMS]
    stated = gpu_check.stated_seconds([vars(check) for room in rooms for check in room])
    assert stated + STARTS < 8 * 60


def test_a_variant_is_compiled_once_and_found_again(tmp_path: Path) -> None:
    """One of the shares compiles it, and another process finds it on disk."""
    from tools.gpu_checks import compiler

    shares = [compiler.Compiler(90, share, 3) for share in range(3)]
    for key in map(str, range(50)):
        left = [one._leaves(key=key, fn=SimpleNamespace(name="kernel")) for one in shares]
        assert left.count(False) == 1
    command = [sys.executable, compiler.__file__, "90", "20", "tiny", "7"]
    environment = compiling._environment() | {"TRITON_CACHE_DIR": str(tmp_path)}
    found = [
        json.loads(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
        for _ in range(2)
    ]
    assert 0 < found[0]["compiled"] < found[0]["variants"] / 5 and not found[1]["compiled"]
    assert len(list(tmp_path.glob("*/*.cubin"))) == found[0]["compiled"]


def test_what_there_is_no_time_for_is_left_out(session: Callable) -> None:
    one = session(seconds=30.0)
    one.run([{"name": "skipped", "seconds": 300}, {"name": "passed", "seconds": 1}])
    one.close()
    assert {name: line["status"] for name, line in one.lines.items()} == {"skipped": "left_out", "passed": "passed"}
    assert gpu_check._summarize(one, ["passed"], 1.0) == 0
    assert gpu_check._summarize(one, ["skipped", "passed"], 1.0) == 3


def test_lines_of_another_kind_of_run_and_half_lines_do_not_count(session: Callable, tmp_path: Path) -> None:
    """A pass on the CPU is none on the card; the last line of a run that was cut off is not read."""
    out = tmp_path / "out.jsonl"
    passed = {"check": "a", "status": "passed", "device": "cpu", "tiny": True, "message": ""}
    out.write_text("\n".join([
        json.dumps(passed), json.dumps(passed | {"check": "b", "device": "cuda"}),
        json.dumps(passed | {"check": "c", "tiny": False}), '{"check": "d", "sta',
    ]))  # fmt: skip
    assert list(gpu_check._found_before(session(out=out))) == ["a"]


def test_names_of_rooms_and_checks() -> None:
    """In their own order; the nearest is said of one that is misspelled."""
    checks = [{"name": name} for name in ("attention.gradients", "attention.rates", "runs.failure")]
    assert gpu_check._chosen(checks, "") == checks
    assert gpu_check._chosen(checks, "runs,attention.rates") == checks[1:]
    wrong = gpu_check._chosen(checks, "runs,atention")
    assert wrong == "--only atention: no room or check is called so. Did you mean attention? --list prints all."


def test_without_a_card_it_says_so(called: Callable) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = called("tools/gpu_check.py", "--list")
    assert done.returncode == 2 and "On a CPU: python tools/gpu_check.py --tiny" in done.stderr


def faults(check: Check) -> list[str]:
    """What a check finds."""
    found = Findings()
    check.run(CPU, found)
    return found.faults


def test_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that are scaled by a hundredth too much."""
    right = document_attention.attend

    def wrong(q, k, v, documents, window=None, scale=None):
        return right(q, k, v, documents, window, 1.02 * (q.shape[-1] ** -0.5 if scale is None else scale))

    monkeypatch.setattr(document_attention, "attend", wrong)
    monkeypatch.setattr(kernels, "of", lambda *_given: document_attention)
    assert len([fault for fault in faults(attention.gradients) if "float32" in fault]) >= 6
    assert faults(attention.alibi)


def test_wrong_matrices_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight of the unpacked matrix, and the offset of the scales of scales."""
    right = FourBitWeight.unpack_into

    def wrong(self, out):
        right(self, out)
        if out.dtype == torch.float16:
            out[3, 5] += 0.001
        return out

    monkeypatch.setattr(FourBitWeight, "unpack_into", wrong)
    found = faults(storages.unpacking)
    assert found and all("float16" in fault and "4" in fault for fault in found)


def test_a_wrong_optimizer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that decay otherwise."""
    right = storages.build_optimizer
    monkeypatch.setattr(storages, "build_optimizer", lambda *given, **named: right(*given, beta2=0.96, **named))
    assert any("adamw, what large moved by" in fault for fault in faults(storages.optimizers))
