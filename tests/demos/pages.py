"""Pages of demos, each in a process of its own."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gradio_client import Client


@contextmanager
def served(
    demo: Path, environment: dict[str, str], *arguments: object, ranks: int = 1
) -> Iterator[tuple[subprocess.Popen, Client]]:
    """The process of a demo's page on the CPU, and a client of it; `page.stdout` holds what is said from then on."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", *launcher, demo, *arguments, "--device", "cpu", "--port", port]
    page = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield page, Client(address_of(page), verbose=False)
    finally:
        page.terminate()
        page.wait(timeout=120)


def address_of(page: subprocess.Popen) -> str:
    """The address the page prints once it is up; it must be loopback."""
    deadline, said = time.monotonic() + 120, ""
    while time.monotonic() < deadline:
        line = page.stdout.readline()
        said += line
        if match := re.search(r"http://\S+", line):
            assert match[0].startswith("http://127.0.0.1:"), match[0]
            return match[0]
        if page.poll() is not None:
            break
    raise AssertionError(said)
