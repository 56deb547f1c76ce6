"""Every attempt meets at a place of its own, whatever the one before left in the store."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from accessory.errors import ParallelError
from accessory.parallel import rendezvous
from accessory.parallel.rendezvous import interface_towards, meet


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> dist.Store:
    """One for all attempts, as torchrun's agent keeps it."""
    kept = dist.HashStore()
    monkeypatch.setattr(rendezvous, "rendezvous", lambda *_, **__: iter([(kept, 0, 0)]))
    return kept


def together(ranks: range, world_size: int, seconds: float = 10) -> dict[int, dist.Store | ParallelError]:
    """What each rank gets, all at once in threads."""
    found: dict[int, dist.Store | ParallelError] = {}

    def come(rank: int) -> None:
        try:
            found[rank] = meet(rank, world_size, timedelta(seconds=seconds))
        except ParallelError as error:
            found[rank] = error

    threads = [threading.Thread(target=come, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_each_attempt_finds_only_its_own(store: dist.Store) -> None:
    """Three attempts in a store; in the second, a rank dies before all have met."""
    first = together(range(3), 3)
    first[1].set("address", "of the first attempt")
    assert first[0].get("address") == first[2].get("address") == b"of the first attempt"
    broken = together(range(2), 3, seconds=0.3)  # rank 2 never comes
    assert "ranks 2 have not come" in str(broken[0])
    third = together(range(3), 3)
    assert not any(third[rank].check(["address"]) for rank in range(3))
    third[2].set("address", "new")
    assert third[0].get("address") == b"new"


def test_without_rank_0_nobody_waits_for_ever(store: dist.Store) -> None:
    assert "rank 0 has not come" in str(together(range(1, 3), 3, seconds=0.3)[1])


def test_the_interface_that_reaches_other_machines() -> None:
    """Of every address of this machine; a loopback address reaches nobody else."""
    addresses = os.popen("hostname -I").read().split()
    names = [interface_towards(address) for address in addresses if ":" not in address]
    assert {*names} <= {name for _, name in socket.if_nameindex()} - {"lo"} and len({*names}) == len(names)
    assert interface_towards("127.0.0.1") is None and interface_towards("no.such.host.invalid") is None


def test_alone_there_is_nothing_to_wait_for() -> None:
    meet(0, 1, timedelta(seconds=1)).set("key", "value")
