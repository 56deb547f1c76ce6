"""A program that starts its own ranks, as upstream's --n_gpus and --gpu_ids do: this process becomes rank 0."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import torch

from accessory.errors import ConfigError
from accessory.parallel.launcher import die_with_parent

_STARTED = "ACCESSORY_STARTED_BY"  # set for ranks that rank 0 started
_HOST = "127.0.0.1"
_GRACE = 10.0  # seconds in which rank 0 may say itself why another rank ended


def start_own_ranks(local_ranks: Sequence[int]) -> None:
    """Start a process with this one's command line for each rank but the first; `local_ranks` are their GPUs' numbers.

    Nothing happens in the processes that were started so, and for no ranks. If one of them fails, all end. Raises
    `ConfigError` where a launcher has started several processes already.
    """
    if _STARTED in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        die_with_parent(int(os.environ[_STARTED]))
        return
    if not local_ranks:
        return
    if "RANK" in os.environ:
        raise ConfigError(
            "--n_gpus and --gpu_ids start the processes themselves: leave them out under torchrun, or leave out "
            "torchrun.",
            common=True,
        )
    place = {"MASTER_ADDR": _HOST, "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(len(local_ranks))}
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max((os.cpu_count() or 1) // len(local_ranks), 1)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    os.environ.update(place | {"RANK": "0", "LOCAL_RANK": str(local_ranks[0])})
    for rank, local_rank in enumerate(local_ranks[1:], 1):
        own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), _STARTED: str(os.getpid())}
        process = subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]],
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C at the terminal is for rank 0
        )
        threading.Thread(target=_watch, args=(rank, process), daemon=True).start()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind((_HOST, 0))
        return free.getsockname()[1]


def _watch(rank: int, process: subprocess.Popen) -> None:
    """End this process if another rank fails: rank 0 may wait for a question, or for that rank to come."""
    if status := process.wait():
        time.sleep(_GRACE)
        print(f"\nrank {rank} (process {process.pid}) ended with status {status}.", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
