"""Finds the rank that made a run of several processes fail, and lets one rank report it, once.

A collective fails on the healthy ranks too, and torchrun's own report shows whichever error came first. Here the rank
whose own code failed puts its error into the store before it leaves, and the others, whose collectives then fail, look
there. If there is none, the ranks that answer name those that do not: they were killed, or hang.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as dist

from accessory import errors
from accessory.errors import AccessoryError, LostRankError

GRACE = 3.0  # seconds for the other ranks to notice as well
_POLL = 0.05  # seconds
_CAUSE = "cause"


class Witness:
    """One rank's view of a run that may fail. `store` is this attempt's, of `meet`."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.store, self.rank, self.world_size = store, rank, world_size
        store.set(f"place-{rank}", json.dumps([os.getpid(), socket.gethostname()]))

    def root_cause(self, error: Exception) -> AccessoryError:
        """The error that all ranks report for `error`; its `prints` is true on the one rank that prints it.

        The main rank prints an error that all ranks have in common, a single rank prints its own. A failed collective
        becomes the error of the rank that caused it, or `LostRankError` naming those that do not answer.
        """
        if isinstance(error, AccessoryError):
            if not error.common:
                return self._cause(error, str(error))
            error.prints = self.rank == 0
            return error
        if self.world_size > 1 and _is_collective(error):
            return self._lost(error)
        traceback.print_exception(error)  # not foreseen, so where it happened is what matters
        return self._cause(error, f"{type(error).__name__}: {error}")

    def _cause(self, error: Exception, message: str) -> AccessoryError:
        """Leave this rank's own error for the others to find, unless another rank's is there already."""
        kind = type(error) if isinstance(error, AccessoryError) else AccessoryError
        where = f"[rank {self.rank}] " if self.world_size > 1 else ""
        mine = json.dumps([kind.__name__, where + message])
        try:
            first = self.store.compare_set(_CAUSE, "", mine).decode() == mine
        except (RuntimeError, ValueError):  # the process that held the store is gone
            first = True
        return kind(where + message, common=True, prints=first)

    def _lost(self, error: Exception) -> AccessoryError:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from a launcher that cleans up; we are leaving anyway
        deadline, silent = time.monotonic() + GRACE, set(range(self.world_size))
        try:
            self.store.set(f"alive-{self.rank}", "")
            while silent and time.monotonic() < deadline:
                if self.store.check([_CAUSE]):
                    kind, message = json.loads(self.store.get(_CAUSE))
                    return getattr(errors, kind)(message, common=True, prints=False)
                silent -= {rank for rank in silent if self.store.check([f"alive-{rank}"])}
                time.sleep(_POLL)
            places = {rank: json.loads(self.store.get(f"place-{rank}")) for rank in silent}
        except (RuntimeError, ValueError):
            said = "the process that the others met at is gone: rank 0, or its torchrun"
            return LostRankError(f"Lost contact: {said} ({_short(error)}).", common=True, prints=True)
        prints = self.rank == min(set(range(self.world_size)) - silent)
        if not silent:
            said = "Every rank still runs, but they wait for one another in vain"
        else:
            for process, host in places.values():
                _end_sibling(process, host)
            named = "; ".join("rank {} (process {} on {})".format(rank, *places[rank]) for rank in sorted(silent))
            said = f"{named} no longer answers: killed, or hanging"
        return LostRankError(f"{said} ({_short(error)}).", common=True, prints=prints)


def _end_sibling(process: int, host: str) -> None:
    """Kill the hanging `process` if our launcher started it: torchrun would wait half a minute more for it."""
    if host != socket.gethostname():
        return
    try:
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        if parent == os.getppid():
            os.kill(process, signal.SIGKILL)
    except (OSError, ValueError, IndexError):  # it is gone, or there is no /proc
        return


def _is_collective(error: Exception) -> bool:
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _short(error: Exception) -> str:
    """The first sentence, without the source file that gloo puts in front of it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line.split("] ", 1)[-1].split(". ", 1)[0].rstrip(". ")
