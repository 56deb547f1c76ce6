"""Who is lost, and who is only busy. Each rank is an object here; real processes are in tests/faults."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch.distributed as dist

from accessory.errors import AccessoryError, DataError, ParallelError
from accessory.parallel import root_cause, watch
from accessory.parallel.root_cause import Witness
from accessory.parallel.watch import Watch
from tests.faults.job import wait_for


class Ranks:
    """Three ranks of this process. told: (rank, error) of each that was ended, ended: their statuses."""

    def __init__(self) -> None:
        self.told: list[tuple[int, AccessoryError]] = []
        self.ended: list[int] = []
        self.order: list[str] = []
        store = dist.HashStore()
        self.watches: list[Watch] = []
        for rank in range(3):
            tellers = [lambda error, rank=rank: self.tell(rank, error), lambda _: self.order.append("before")]
            self.watches.append(Watch(Witness(store, rank, 3), "127.0.0.1", tellers))

    def tell(self, rank: int, error: AccessoryError) -> None:
        """As `run_entry` prints it."""
        self.order.append("told")
        self.told.append((rank, error))

    def die(self, rank: int) -> None:
        """As the kernel does for a process that is killed."""
        self.watches[rank]._leaving.set()
        self.watches[rank]._alarmed = lambda *_, **__: None
        connections = [self.watches[rank]._channel.connection]
        if hub := self.watches[rank].hub:
            hub.tell = lambda **_: None
            connections = [channel.connection for channel in hub.members.values()]
        for connection in connections:
            connection.shutdown(socket.SHUT_RDWR)

    def messages(self, *ranks: int) -> list[str]:
        """What they were told, once they were ended; exactly one of them prints it."""
        wait_for(lambda: sorted(rank for rank, _ in self.told) == sorted(ranks), seconds=20)
        assert sum(bool(error.prints) for _, error in self.told) == 1
        return [str(error) for _, error in self.told]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """With little patience."""
    for place, name, seconds in ((watch, "GRACE", 0.3), (watch, "LATER", 0.1), (watch, "_BEAT", 0.1)):
        monkeypatch.setattr(place, name, seconds)
    monkeypatch.setattr(root_cause, "GRACE", 1.0)
    monkeypatch.setattr(watch.atexit, "register", lambda _: None)
    found = Ranks()
    monkeypatch.setattr(watch.os, "_exit", found.ended.append)
    wait_for(lambda: len(found.watches[0].hub.members) == 3)
    yield found
    for one in found.watches:
        one.leave()


def test_a_rank_that_dies_ends_the_others(ranks: Ranks) -> None:
    ranks.die(2)
    for message in ranks.messages(0, 1):
        assert message.startswith("rank 2 (process ") and message.endswith("(rank 2 closed its connection).")
    wait_for(lambda: ranks.ended == [7, 7])
    assert ranks.order.count("told") == ranks.order.count("before") == 2 and ranks.order[0] == "before"


def test_rank_0_is_missed_too(ranks: Ranks) -> None:
    ranks.die(0)
    assert all(message.startswith("rank 0 (process ") for message in ranks.messages(1, 2))


@pytest.mark.parametrize("hanging", [0, 2])
def test_a_rank_that_stays_behind_is_what_the_others_wait_for(ranks: Ranks, hanging: int) -> None:
    """All make no more progress, the others after more of it. Only one of three messages is printed."""
    with ExitStack() as inside:
        for rank, one in enumerate(ranks.watches):
            one.timeout = 1.0
            inside.enter_context(one.supervised())
            if rank != hanging:
                one.tick()
        found = ranks.messages(0, 1, 2)
    assert all(message.startswith(f"rank {hanging} (process ") and "no progress for" in message for message in found)


def test_a_short_failure_of_the_network_ends_no_run(ranks: Ranks) -> None:
    """Its kernel gives a connection up only after a minute; what hides that would be a machine without power."""
    for one in ranks.watches:
        options = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        connection = one._channel.connection
        found = [connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) for option in options]
        assert found[0] + found[1] * found[2] == found[3] // 1000 == 60


def test_who_is_busy_is_not_lost(ranks: Ranks) -> None:
    """Outside a supervised section for whatever long, inside as long as there is progress; one has left before."""
    for one in ranks.watches:
        one.timeout = 0.3
    ranks.watches[2].leave()
    ranks.die(2)
    with ranks.watches[1].supervised():
        for _ in range(15):
            ranks.watches[1].tick()
            time.sleep(0.1)
    assert not ranks.told


def test_a_process_that_was_stopped_and_goes_on_is_not_lost(ranks: Ranks) -> None:
    """Nobody could see its progress in that time."""
    with ExitStack() as inside:
        for one in ranks.watches:
            one.timeout = 5.0
            inside.enter_context(one.supervised())
            one._since = one._looked = time.monotonic() - 60
        time.sleep(0.8)
        assert not ranks.told


def test_a_stranger_changes_nothing(ranks: Ranks) -> None:
    """Who knows the port but not the token is sent away."""
    for said in (json.dumps({"token": "x", "rank": 1}).encode(), b"GET / HTTP/1.1", b"[1]"):
        with socket.create_connection(("127.0.0.1", ranks.watches[0].hub.server.getsockname()[1])) as stranger:
            stranger.sendall(said + b"\n")
            assert stranger.recv(1) == b""
    time.sleep(0.5)
    assert not ranks.told and len(ranks.watches[0].hub.members) == 3


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_ends_all(ranks: Ranks, failing: int) -> None:
    """It reaches them without the store, which may be gone with rank 0."""
    ranks.watches[failing].claim()
    error = ranks.watches[failing].witness.root_cause(DataError("line 3"))
    assert error.prints
    ranks.die(failing)
    others = [rank for rank in range(3) if rank != failing]
    wait_for(lambda: sorted(rank for rank, _ in ranks.told) == others)
    assert all(type(error) is DataError and not error.prints for _, error in ranks.told)
    assert {str(error) for _, error in ranks.told} == {f"[rank {failing}] line 3"}


def test_the_main_thread_comes_first_if_it_comes(ranks: Ranks) -> None:
    """With an error of its own, as gloo raises; and does not go on while the process is being ended."""
    ranks.watches[1].claim()
    ranks.die(2)
    wait_for(lambda: [rank for rank, _ in ranks.told] == [0])
    late = threading.Thread(target=ranks.watches[0].claim, daemon=True)
    late.start()
    late.join(0.3)
    assert late.is_alive() and [rank for rank, _ in ranks.told] == [0]


def test_rank_0_that_cannot_be_reached_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ParallelError, match=rf"cannot be reached at 127\.0\.0\.1:{port} .*MASTER_ADDR"):
        watch._connected("127.0.0.1", port)
