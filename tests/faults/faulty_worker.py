"""`main_finetune.py` with faults: started like it, under torchrun, with FAULTS in the environment.

FAULTS is a JSON list of {"do": what, "rank": r, "step": s, "attempt": a}; it strikes as that rank is in the first
micro-batch of that step, before its backward. An absent attempt is every one. FIRED names a directory in which each
fault leaves a file as it strikes, for tests to see that it did.
"""

import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.parallel.launcher import die_with_launcher

die_with_launcher()

import torch

from accessory.checkpoint import save
from accessory.config import FinetuneConfig
from accessory.engine import Engine
from accessory.entry import run_entry
from accessory.finetuning import finetune
from accessory.parallel import groups, parameters
from accessory.parallel.groups import data_parallel_group
from accessory.run import saving

RANK, ATTEMPT = int(os.environ.get("RANK", "0")), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def hold_the_interpreter() -> None:
    """In a thread, as a C extension that never gives it back would."""
    threading.Thread(target=lambda: ctypes.PyDLL(None).sleep(1000)).start()
    time.sleep(0.1)


def wait_as_nccl_does() -> None:
    """In a call into C that neither returns nor is interrupted, whatever becomes of the other ranks.

    As on a GPU, this rank's part of the computation is launched before that.
    """
    groups.tick()
    mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex)
    lock(mutex)


def limit_files() -> None:
    """Files may not grow beyond 16 KiB: writing fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, resource.RLIM_INFINITY))


def limit_memory() -> None:
    """No more address space than there is now, and a large block on top is asked for."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
    torch.zeros(1 << 30)


def fail(error: Exception) -> None:
    """Raise it."""
    raise error


def end_launcher_in_save() -> None:
    """SIGTERM to torchrun as the next checkpoint is half written, twice; the save takes a second longer."""
    write = save.write_tensors

    def slowly(*given) -> None:
        write(*given)
        for _ in range(2):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(0.5)

    save.write_tensors = slowly


def fail_in_save(place: object, name: str) -> None:
    """This rank's part in the next save fails, where `place.name` is called."""
    setattr(place, name, lambda *_: fail(OSError(5, "Input/output error")))


ACTIONS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hold": hold_the_interpreter,
    "sleep": lambda: time.sleep(1000),
    "wait_as_nccl_does": wait_as_nccl_does,
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "interrupt": lambda: os.kill(os.getpid(), signal.SIGINT),
    "end_launcher_in_save": end_launcher_in_save,
    "fail_as_weights_are_gathered": lambda: fail_in_save(parameters, "gather_slices"),
    "fail_as_state_is_gathered": lambda: fail_in_save(saving, "collect_training_state"),
    "raise": lambda: fail(KeyError("a fault of the program")),
    "out_of_memory": lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")),
    "limit_memory": limit_memory,
    "limit_files": limit_files,
    "other_collective": lambda: torch.distributed.all_reduce(torch.zeros(5), group=data_parallel_group()),
}


def strike(progress, faults: list[dict]) -> None:
    """Do what is due at this step."""
    for fault in faults:
        if (fault["rank"], fault["step"]) == (RANK, progress.total_steps + 1) and fault.get(
            "attempt", ATTEMPT
        ) == ATTEMPT:
            (Path(os.environ["FIRED"]) / f"{fault['do']}-rank{RANK}-attempt{ATTEMPT}").touch()
            ACTIONS[fault["do"]]()


def install(faults: list[dict]) -> None:
    """Strike in the forward of each step's first micro-batch."""
    accumulate, forward = Engine._accumulate, Engine._forward

    def accumulate_with_faults(self, progress, *given):
        self.due = progress
        return accumulate(self, progress, *given)

    def forward_with_faults(self, *given):
        progress, self.due = self.due, None
        if progress is not None:
            strike(progress, faults)
        return forward(self, *given)

    Engine._accumulate, Engine._forward = accumulate_with_faults, forward_with_faults


if __name__ == "__main__":
    install(json.loads(os.environ["FAULTS"]))
    run_entry(FinetuneConfig, finetune)
