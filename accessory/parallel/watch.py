"""Ends a process whose main thread waits, in a call that nothing interrupts, for a rank that died, failed or hangs.

NCCL raises nothing when a peer is gone: its kernels wait, and the main thread with them, until NCCL's watchdog aborts
the process without a message. So each rank has a thread here that holds a TCP connection to rank 0. When a process
dies, the kernel closes its connection, and all ranks learn of it at once. A busy process keeps its connection, even
while it holds the interpreter's lock for minutes. Heartbeats alone could not tell a dead process from a busy one.

A rank hangs if its main thread makes no progress for `timeout` seconds inside a `supervised` section, where all ranks
compute together. Outside of such sections, one rank may work for long while the others wait.
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

GRACE = 5.0  # seconds for the main thread to notice by itself, as it does with gloo
LATER = 2.0  # seconds after gloo's own time limit at which we report a hang
SILENCE = 60  # seconds without a reply from its kernel after which a machine counts as lost
_BEAT = 1.0  # seconds between reports of progress
_PLACE = "watch"
_LONGEST_LINE = 1 << 16


class Channel:
    """JSON objects over a TCP connection, one a line. `rank`: who is at the other end; -1 until it says so."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection, self.rank, self.left, self.waits = connection, -1, False, False
        self.progress, self.heard = (0, 0), time.monotonic()
        self._rest, self._sending = b"", threading.Lock()
        connection.settimeout(_BEAT)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A machine that loses its power closes no connection, but its kernel stops answering. The limit is long, so
        # that a network failure of some seconds, or a machine that is being moved, ends no run.
        for name, value in {"KEEPIDLE": 15, "KEEPINTVL": 15, "KEEPCNT": 3, "USER_TIMEOUT": 1000 * SILENCE}.items():
            if (option := getattr(socket, f"TCP_{name}", None)) is not None:
                connection.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, **message: Any) -> None:
        """Send a message. If the other end is gone, nothing happens here: `receive` reports it."""
        with self._sending, suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that come within a second; None if the other end is gone, or sends anything but our messages."""
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
    """The thread of rank 0 to which all ranks are connected: it tells all who is gone, and who gave up."""

    def __init__(self) -> None:
        super().__init__(name="watch-hub", daemon=True)
        self.server, self.token = _listening(), secrets.token_hex(16)
        self.members: dict[int, Channel] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.server, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve the ranks until the process ends."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._admit()
                elif not self._hear(key.data):
                    self._drop(key.data)

    def tell(self, **message: Any) -> None:
        """Send a message to all ranks."""
        for channel in list(self.members.values()):
            channel.send(**message)

    def alarm(self, rank: int, why: str, waited: bool, by_main: bool, cause: list[Any] | None) -> None:
        """Tell all that `rank` gave up; if it waited too long, also which ranks it seems to have waited for."""
        if by_main and rank in self.members:
            self.members[rank].waits = True
        self.tell(alarm=why, silent=self._behind() if waited else [], cause=cause)

    def _admit(self) -> None:
        with suppress(OSError):
            channel = Channel(self.server.accept()[0])
            self._selector.register(channel.connection, selectors.EVENT_READ, channel)

    def _hear(self, channel: Channel) -> bool:
        """Handle a rank's messages; False once it is gone, and for a stranger, who does not know the token."""
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
        """Ranks that are furthest behind or silent, unless they are waiting for others themselves."""
        members = list(self.members.items())  # a copy: the hub's thread may drop a member meanwhile
        there = {rank: channel for rank, channel in members if not channel.left}
        far, now = sorted(channel.progress for channel in there.values()), time.monotonic()
        return [
            rank
            for rank, channel in sorted(there.items())
            if not channel.waits and (far[0] == channel.progress < far[-1] or now - channel.heard > 3 * _BEAT)
        ]


class Watch:
    """One rank's connection to the hub. `host`: rank 0's address; raises `ParallelError` if it cannot be reached.

    tellers: called with the error before it ends the process, the last one first. timeout: seconds without progress
    in a supervised section after which a rank is taken to hang. backends: each collective of theirs is progress.
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
        """Note that the main thread makes progress."""
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
        """The main thread has an error of its own and ends the process; if the watch already does, wait for the end."""
        if not self._claimed_by("main"):
            threading.Event().wait()  # for ever: the other thread ends the process

    def leave(self) -> None:
        """Tell the others that this rank ends without an error."""
        self._leaving.set()
        if self._channel:
            self._channel.send(left=True)
        if self.hub:
            self.hub.tell(left=True)

    def _leave_if_well(self) -> None:
        """Leave at the end of a program that did not call `leave`, unless it failed."""
        if self._owner is None and not hasattr(sys, "last_value"):  # `last_value`: an exception that nothing caught
            self.leave()

    def _claimed_by(self, who: str) -> bool:
        with self._owning:
            self._owner = self._owner or who
            return self._owner == who

    def _raise_alarm(self, why: str, waited: bool, cause: list[Any] | None, by_main: bool = True) -> None:
        if self.hub:  # called directly: this process may end before the hub's thread would send it
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
        stopped = now - self._looked > 5 * _BEAT  # the whole process was stopped, by Ctrl-Z say
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
        """End the process in the main thread's place, unless the main thread is doing so itself."""
        if not self._claimed_by("watch"):
            return
        error = self.witness.lost(self._why, answers=not self._suspect)
        for teller in reversed(self.tellers):
            try:
                teller(error)
            except Exception:  # whatever a teller raises, this process must end
                traceback.print_exc()
        if not self.tellers and error.prints:
            print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(error.status)


def _listening() -> socket.socket:
    """A server on a free port of all addresses, because other ranks may be on other machines."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # the machine may have IPv6, but switched off
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
