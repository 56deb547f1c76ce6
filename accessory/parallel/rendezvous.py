"""The key/value store in which the processes of one attempt meet, empty of what earlier attempts wrote."""

from __future__ import annotations

import fcntl
import socket
import struct
import time
import uuid
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from accessory.errors import ParallelError

_POLL = 0.01  # seconds
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of linux/sockios.h


def meet(rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A store for the `world_size` processes of this attempt, empty but for what they write. Blocks until all are here.

    torchrun keeps its store over restarts, and gloo would find addresses of dead processes in it (pytorch #135712). So
    all keys of an attempt begin with a name that its rank 0 makes up. Raises `ParallelError` if not all come in time.
    """
    if world_size == 1:
        return dist.HashStore()
    store, *_ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    deadline = time.monotonic() + timeout.total_seconds()
    name = _name_attempt(store, world_size, deadline) if rank == 0 else _ask_for_name(store, rank, deadline)
    return dist.PrefixStore(name, store)


def interface_towards(host: str) -> str | None:
    """The network interface that leads to `host` (a name or IPv4 address); None if `host` is this machine.

    Gloo by default takes the address of this machine's own name. Other machines cannot reach it if it is a loopback
    address, as on Debian.
    """
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((host, 9))  # sends nothing (UDP), but chooses the interface
        own = sender.getsockname()[0]
        for _, name in socket.if_nameindex() if not own.startswith("127.") else ():
            with suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(sender, _ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    return None


def _name_attempt(store: dist.Store, world_size: int, deadline: float) -> str:
    """Make up the name and answer every question, even a dead process's, until all other ranks have confirmed it."""
    name = f"attempt-{uuid.uuid4().hex}"
    missing = set(range(1, world_size))
    while missing:
        for rank in sorted(missing):
            if store.check([f"asks-{rank}"]):
                store.set(f"answer-{store.get(f'asks-{rank}').decode()}", name)
            if store.check([f"{name}-{rank}"]):
                missing.discard(rank)
        _wait(deadline, f"ranks {', '.join(map(str, sorted(missing)))} have not come")
    return name


def _ask_for_name(store: dist.Store, rank: int, deadline: float) -> str:
    question = uuid.uuid4().hex  # an answer to it cannot be of an earlier attempt
    store.set(f"asks-{rank}", question)
    while not store.check([f"answer-{question}"]):
        _wait(deadline, "rank 0 has not come")
    name = store.get(f"answer-{question}").decode()
    store.set(f"{name}-{rank}", "")
    return name


def _wait(deadline: float, reason: str) -> None:
    if time.monotonic() > deadline:
        raise ParallelError(f"The processes have not met: {reason}.")
    time.sleep(_POLL)
