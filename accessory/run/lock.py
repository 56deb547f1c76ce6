"""One run at a time in an output directory."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from accessory.errors import ConfigError

LOCK_FILE = ".lock"
_PATIENCE = 3.0  # seconds in which the processes of a launcher that was just killed are gone


def claim_directory(directory: Path | None, held: ExitStack, flag: str = "--output_dir") -> None:
    """Make the directory that `flag` names, check that it can be written to, and lock it until `held` ends."""
    if directory is None:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {directory}: cannot be written to ({error.strerror}).") from error
    held.enter_context(lock(directory, flag))


@contextmanager
def lock(directory: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Hold the directory that `flag` names for this process. The kernel lets go of it when the process ends.

    The file is removed in the end, but for a process that is killed. Raises `ConfigError` that names the host and
    process which hold it.
    """
    path, deadline = directory / LOCK_FILE, time.monotonic() + _PATIENCE
    while True:
        with path.open("a+", encoding="utf-8") as file:
            if _taken(file.fileno(), path):
                now = time.strftime("%Y-%m-%d %H:%M:%S")
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
                file.flush()
                try:
                    yield
                finally:
                    with suppress(OSError):
                        path.unlink()
                return
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    f"{flag} {directory}: a run is at work there: {holder}. Wait for it, end it, or give another "
                    f"{flag}."
                )
        time.sleep(0.1)


def _taken(handle: int, path: Path) -> bool:
    """Whether the file is this process's now, and is still the one at `path`: its last holder may have removed it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False
