"""Ends a process whose main thread waits, in a call that nothing interrupts, for a rank that died, failed or hangs.

NCCL raises nothing when a peer is gone: its kernels wait, and with them the main thread, until its own watchdog aborts
the process without a word. So each rank has a thread here that holds a TCP connection to rank 0. When a process dies,
the kernel closes its connection, and all learn of it at once; a process that is only busy keeps it, though it may hold
the interpreter's lock for minutes. A thread that only looked for a sign of life could not tell them apart.

A rank hangs if its main thread makes no progress for as long as ranks may wait for one another, inside a section that
is `supervised`: where all ranks compute together, and long work of one of them is no excuse.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from accessory.errors import AccessoryError, ParallelError
from accessory.parallel.root_cause import Witness

GRACE = 5.0  # seconds in which the main thread may notice by itself, as gloo lets it
LATER = 2.0  # seconds by which a hang is noticed after gloo's own limit
SILENCE = 60  # seconds without a word of its kernel after which a machine is taken to be lost
_BEAT = 1.0  # seconds
_PLACE = "watch"
_LONGEST_LINE = 1 << 16


class Channel:
    """JSON objects over a TCP connection, one a line. `rank`: whose it is, once that is known."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rank, self.left, self.waits = connection, -1, False, False
        self.progress, self.heard = (0, 0), time.monotonic()
        self._rest, self._sending = b"", threading.Lock()
        connection.settimeout(_BEAT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that loses its power closes no connection; its kernel's silence is noticed. Not sooner: a network
        # that fails for some seconds, or a machine that is moved, delays collectives, and ends no run.
        for name, value in {"KEEPIDLE": 15, "KEEPINTVL": 15, "KEEPCNT": 3, "USER_TIMEOUT": 1000 * SILENCE}.items():
            if (option := getattr(socket, f"TCP_{name}", None)) is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, **message: Any) -> None:
        """To an end that is gone nothing is sent; `receive` says that it is."""
        with self._sending, suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """What comes within a second; None once the other end is gone, or sends what is none of ours."""
        try:
            data = self.connection.recv(_LONGEST_LINE)
            *lines, self._rest = (self._rest + data).split(b"\n")
            found = [json.loads(line) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError, RecursionError):
            return None
        fits = data and len(self._rest) < _LONGEST_LINE and all(isinstance(message, dict) for message in found)
        return found if fits else None


class Hub(threading.Thread):
    """The thread of rank 0 to which all ranks are connected: it passes on who is gone, and who gave up."""

    def __init__(self) -> None:
        super().__init__(name="watch-hub", daemon=True)
        self.server, self.token = _listening(), secrets.token_hex(16)
        self.members: dict[int, Channel] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.server, selectors.EVENT_READ)

    def run(self) -> None:
        """Until the process ends."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._admit()
                elif not self._hear(key.data):
                    self._drop(key.data)

    def tell(self, **message: Any) -> None:
        """To all ranks."""
        for channel in list(self.members.values()):
            channel.send(**message)

    def alarm(self, rank: int, why: str, waited: bool, by_main: bool, cause: list[Any] | None) -> None:
        """Pass on that `rank` gave up; for waiting too long, with those that it seems to have waited for."""
        if by_main and rank in self.members:
            self.members[rank].waits = True
        self.tell(alarm=why, silent=self._behind() if waited else [], cause=cause)

    def _admit(self) -> None:
        with suppress(OSError):
            channel = Channel(self.server.accept()[0])
            self._selector.register(channel.connection, selectors.EVENT_READ, channel)

    def _hear(self, channel: Channel) -> bool:
        """Take what a rank says; False once it is gone. A stranger, who does not know the token, is sent away."""
        messages = channel.receive()
        for message in messages or ():
            channel.heard = time.monotonic()
            if channel.rank < 0 and message.get("token") != self.token:
                return False
            if "token" in message:
                channel.rank = int(message["rank"])
                self.members[channel.rank] = channel
            elif "progress" in message:
                channel.progress = tuple(message["progress"])
            elif "left" in message:
                channel.left = True
            elif "alarm" in message:
                self.alarm(channel.rank, **message["alarm"])
        return messages is not None

    def _drop(self, channel: Channel) -> None:
        self._selector.unregister(channel.connection)
        channel.connection.close()
        if self.members.pop(channel.rank, None) and not channel.left:
            self.tell(alarm=f"rank {channel.rank} closed its connection", silent=[channel.rank], cause=None)

    def _behind(self) -> list[int]:
        """Ranks that have come least far, or have no life in them, and have not given up waiting themselves."""
        members = list(self.members.items())  # at once: the hub's thread may drop one meanwhile
        there = {rank: channel for rank, channel in members if not channel.left}
        far, now = sorted(channel.progress for channel in there.values()), time.monotonic()
        return [
            rank
            for rank, channel in sorted(there.items())
            if not channel.waits and (far[0] == channel.progress < far[-1] or now - channel.heard > 3 * _BEAT)
        ]


class Watch:
    """One rank's end. `host` is where rank 0 is reached; raises `ParallelError` where it is not.

    tellers: are told the error before the process is ended for it, the last one first. timeout: seconds without
    progress in a supervised section after which a rank is taken to hang. backends: whose collectives are progress.
    """

    def __init__(self, witness: Witness, host: str, tellers: list[Callable[[AccessoryError], object]]) -> None:
        self.witness, self.tellers, self.timeout = witness, tellers, math.inf
        self.backends: Sequence[dist.Backend] = ()
        self._section, self._ticks, self._inside, self._begun = 0, 0, False, 0
        self._progress, self._since, self._looked = (0, 0), time.monotonic(), time.monotonic()
        self._owner: str | None = None
        self._owning, self._leaving = threading.Lock(), threading.Event()
        self._why, self._due, self._suspect = "", math.inf, False
        self.hub = Hub() if witness.rank == 0 else None
        if self.hub:
            self.hub.start()
            place = [self.hub.server.getsockname()[1], self.hub.token]
            witness.store.set(_PLACE, json.dumps(place))
        port, token = json.loads(witness.store.get(_PLACE))
        self._channel: Channel | None = Channel(_connected(host, port))
        self._channel.send(token=token, rank=witness.rank)
        witness.alarm = self._raise_alarm
        atexit.register(self._leave_if_well)
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def tick(self) -> None:
        """The main thread makes progress."""
        self._ticks += 1

    @contextmanager
    def supervised(self) -> Iterator[None]:
        """Inside this context the main thread must make progress, or is taken to hang. All ranks enter alike."""
        self._section += 1
        self._ticks, self._begun, self._inside = 0, self._collectives(), True
        try:
            yield
        finally:
            self._inside = False

    def claim(self) -> None:
        """The main thread has an error of its own to tell, and ends the process; not if that is happening already."""
        if not self._claimed_by("main"):
            threading.Event().wait()  # for the end, which the other thread brings

    def leave(self) -> None:
        """This rank goes, and all is well."""
        self._leaving.set()
        if self._channel:
            self._channel.send(left=True)
        if self.hub:
            self.hub.tell(left=True)

    def _leave_if_well(self) -> None:
        """At the end of a program that does not say so itself."""
        if self._owner is None and not hasattr(sys, "last_value"):  # of an exception that nothing caught
            self.leave()

    def _claimed_by(self, who: str) -> bool:
        with self._owning:
            self._owner = self._owner or who
            return self._owner == who

    def _raise_alarm(self, why: str, waited: bool, cause: list[Any] | None, by_main: bool = True) -> None:
        if self.hub:  # itself: this process may end before the thread has passed it on
            self.hub.alarm(0, why, waited, by_main, cause)
        elif channel := self._channel:
            channel.send(alarm={"why": why, "waited": waited, "by_main": by_main, "cause": cause})

    def _run(self) -> None:
        while not self._leaving.is_set():
            if self._channel:
                self._channel.send(progress=self._progress)
                self._listen()
            else:
                self._leaving.wait(_BEAT)
            still = self._still()
            if still > self.timeout + LATER and self._due == math.inf:
                why = f"no progress for {still:.0f} s"
                self._raise_alarm(why, waited=True, cause=None, by_main=False)
                self._alarmed(why, suspect=False, grace=_BEAT, answers=self._channel is None)
            if time.monotonic() > self._due and not self._leaving.is_set():
                self._end()
                return

    def _still(self) -> float:
        """Seconds since the main thread was last seen to make progress: a tick, or another collective begun."""
        progress, now = (self._section, self._ticks + self._collectives() - self._begun), time.monotonic()
        stopped = now - self._looked > 5 * _BEAT  # this whole process was, by Ctrl-Z say
        if progress != self._progress or not self._inside or stopped:
            self._progress, self._since = progress, now
        self._looked = now
        return now - self._since

    def _collectives(self) -> int:
        return sum(backend._get_sequence_number_for_group() for backend in self.backends)

    def _listen(self) -> None:
        messages = self._channel.receive()
        if messages is None:
            self._channel = None
            self._alarmed("rank 0 closed its connection", suspect=False, grace=GRACE)
        for message in messages or ():
            if "left" in message:
                self._leaving.set()
            elif "alarm" in message:
                if message["cause"]:
                    self.witness.known = message["cause"]
                suspect = self.witness.rank in message["silent"]
                self._alarmed(message["alarm"], suspect, GRACE)

    def _alarmed(self, why: str, suspect: bool, grace: float, answers: bool = True) -> None:
        if self._due == math.inf:
            self._why, self._due = why, time.monotonic() + grace
        self._suspect |= suspect
        if answers and not self._suspect:
            self.witness.answer()

    def _end(self) -> None:
        """End the process in the main thread's place, unless that is about to do so itself."""
        if not self._claimed_by("watch"):
            return
        error = self.witness.lost(self._why, answers=not self._suspect)
        for teller in reversed(self.tellers):
            try:
                teller(error)
            except Exception:  # whatever it is: this process must end all the same
                traceback.print_exc()
        if not self.tellers and error.prints:
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(error.status)


def _listening() -> socket.socket:
    """On a free port of all addresses: other ranks may be on other machines."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # IPv6 may be there and switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def _connected(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=60)
    except OSError as error:
        raise ParallelError(
            f"Rank 0 cannot be reached at {host}:{port} ({error}). Ranks need free ports of each other's machines, as "
            "gloo and NCCL do: look at firewalls and at MASTER_ADDR."
        ) from error
