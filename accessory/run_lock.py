"""One run at a time in an output directory."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accessory.errors import ConfigError

LOCK_FILE = ".lock"
_PATIENCE = 3.0  # seconds in which the processes of a launcher that was just killed are gone


@contextmanager
def lock(output_dir: Path) -> Iterator[None]:
    """Hold `output_dir` for this process. The kernel lets go of it when the process ends, however it does.

    Raises `ConfigError` that names the host and process which hold it.
    """
    path = output_dir / LOCK_FILE
    with path.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + _PATIENCE
        while not _taken(file.fileno()):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    f"--output_dir {output_dir}: a run is at work there: {holder}. Wait for it, end it, or give "
                    "another --output_dir."
                )
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
