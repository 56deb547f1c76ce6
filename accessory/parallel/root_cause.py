"""Finds the rank that made a run of several processes fail, and lets one rank report it, once.

A collective fails on the healthy ranks too, and torchrun's own report shows whichever error came first. Here the rank
whose own code failed puts its error into the store before it leaves, and the others, whose collectives then fail, look
there. If there is none, the ranks that answer name those that do not: they were killed, or hang.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from accessory import errors
from accessory.errors import AccessoryError, LostRankError, OutOfMemoryError, is_out_of_memory

GRACE = 3.0  # seconds for the other ranks to notice as well
_PATIENCE = 5.0  # seconds for the store to answer
_POLL = 0.05  # seconds
_CAUSE = "cause"
_GONE = (RuntimeError, ValueError)  # what a store raises after its process is gone
Alarm = Callable[[str, bool, list[Any] | None], None]


class Witness:
    """One rank's view of a run that may fail. `store` is this attempt's, of `meet`.

    alarm: tells the other ranks that this one gives up, since their main threads may wait and notice nothing. It takes
    the reason, whether this rank waited too long, and the cause, if known. known: the cause that another rank told:
    kind of error, message, rank.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        # The witness has its own connection: on a shared one, a call waits while another thread waits for a key.
        self.store, self.rank, self.world_size = store.clone(), rank, world_size
        self.alarm: Alarm = lambda why, waited, cause: None
        self.known: list[Any] | None = None
        self.store.set(f"place-{rank}", json.dumps([os.getpid(), socket.gethostname()]))

    def root_cause(self, error: Exception) -> AccessoryError:
        """The error that all ranks report for `error`; its `prints` is true on the one rank that prints it.

        The main rank prints an error that all ranks have in common, a single rank prints its own. A failed collective
        becomes the error of the rank that caused it, or `LostRankError` naming those that do not answer.
        """
        if isinstance(error, AccessoryError):
            if not error.common:
                return self._own(error, str(error))
            error.prints = self.rank == 0
            return error
        if is_out_of_memory(error):  # checked first: NCCL, too, may raise it in a collective
            traceback.print_exception(error)
            return self._own(OutOfMemoryError(), f"Memory ran out: {_short(error)}.")
        if self.world_size > 1 and _is_collective(error):
            said = _short(error)
            self.alarm(said, "timed out" in said.lower(), None)
            return self.lost(said)
        traceback.print_exception(error)  # not foreseen, so where it happened is what matters
        return self._own(error, f"{type(error).__name__}: {error}")

    def answer(self) -> None:
        """Say that this rank lives, and does not keep the others waiting."""
        with suppress(*_GONE):
            self.store.set(f"alive-{self.rank}", "")

    def lost(self, why: str, answers: bool = True) -> AccessoryError:
        """The error after a wait in vain, for the reason `why`: another rank's error, or that ranks do not answer.

        answers: whether this rank says that it lives; not if the others wait for it, since they then report first.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from a launcher that cleans up; we are leaving anyway
        seconds = GRACE if answers else 2 * GRACE
        try:
            found = _within(seconds + _PATIENCE, self._found_out, answers, seconds)
        except _GONE:
            said = "the process that the others met at is gone, or stopped: rank 0, or its torchrun"
            found = self._told() if self.known else LostRankError(f"Lost contact: {said} ({why}).", prints=True)
            found.common = True
            return found
        return found if isinstance(found, AccessoryError) else self._first(LostRankError, f"{found} ({why}).")

    def _found_out(self, answers: bool, seconds: float) -> AccessoryError | str:
        """Another rank's error; or, after so many seconds, a message that names the ranks without an answer."""
        deadline, silent = time.monotonic() + seconds, set(range(self.world_size))
        if answers:
            self.answer()
        while silent and time.monotonic() < deadline:
            if found := self._told():
                return found
            silent -= {rank for rank in silent if self.store.check([f"alive-{rank}"])}
            time.sleep(_POLL)
        return self._silence(silent)

    def _told(self) -> AccessoryError | None:
        """The error that another rank has reported."""
        if self.known is None and self.store.check([_CAUSE]):
            self.known = json.loads(self.store.get(_CAUSE))
        return self.known and getattr(errors, self.known[0])(self.known[1], common=True, prints=False)

    def _silence(self, silent: set[int]) -> str:
        """The message for ranks that do not answer; those that our launcher started are killed."""
        if not silent:
            return "Every rank still runs, but they wait for one another in vain"
        places = {rank: json.loads(self.store.get(f"place-{rank}")) for rank in sorted(silent)}
        for process, host in places.values():
            _end_sibling(process, host)
        named = "; ".join("rank {} (process {} on {})".format(rank, *place) for rank, place in places.items())
        return f"{named} no longer answers: killed, or hanging"

    def _own(self, error: Exception, message: str) -> AccessoryError:
        kind = type(error) if isinstance(error, AccessoryError) else AccessoryError
        return self._first(kind, f"[rank {self.rank}] {message}" if self.world_size > 1 else message)

    def _first(self, kind: type[AccessoryError], message: str) -> AccessoryError:
        """Leave this rank's error for the others to find; returns the error left first, by whichever rank."""
        mine = json.dumps([kind.__name__, message, self.rank])
        try:
            first = _within(_PATIENCE, self.store.compare_set, _CAUSE, "", mine).decode()
        except _GONE:
            first = mine
        self.alarm(message, False, json.loads(first))
        if first != mine:
            self.known = json.loads(first)
            return self._told()
        return kind(message, common=True, prints=True)


def _within(seconds: float, work: Callable[..., Any], *given: Any) -> Any:
    """Run `work`, which uses the store, and return or raise what it does; `RuntimeError` after so many seconds.

    A time limit of our own is needed: if the store's process is stopped, calls ignore the store's timeout.
    """
    done: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        """Runs in a thread that is left behind if it does not return."""
        try:
            done.put((work(*given), None))
        except Exception as error:  # the caller raises it
            done.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = done.get(timeout=seconds)
    except queue.Empty:
        raise RuntimeError("the store does not answer") from None
    if error:
        raise error
    return result


def _end_sibling(process: int, host: str) -> None:
    """Kill the hanging `process` if our launcher started it: torchrun would wait half a minute more for it."""
    if host != socket.gethostname() or process == os.getpid():
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
