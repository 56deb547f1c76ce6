"""Demos in a terminal of their own."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CTRL_C, CTRL_D = "\x03", "\x04"


class Pty:
    """A program with a terminal of its own; as a context, it is killed in the end."""

    def __init__(self, arguments: list[Any], environment: dict[str, str]) -> None:
        self.end, theirs = pty.openpty()
        self.unread = ""
        self._decoded = codecs.getincrementaldecoder("utf-8")("replace").decode  # a read may end within a character
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=environment | {"TERM": "dumb"}, stdin=theirs, stdout=theirs,
            stderr=theirs, start_new_session=True, preexec_fn=_take_terminal, cwd=ROOT,
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Pty:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)

    def type(self, text: str | bytes) -> None:
        """Press keys."""
        os.write(self.end, text if isinstance(text, bytes) else text.encode())

    def leave(self) -> None:
        """By Ctrl-D, with a status of 0."""
        self.type(CTRL_D)
        assert self.process.wait(120) == 0

    def begun(self) -> None:
        """Wait for anything to be shown."""
        while not self.unread:
            self._read()

    def interrupt_prompt(self, ending: str) -> str:
        """Press Ctrl-C where a line is asked for, and wait for `ending`.

        Readline shows its prompt before it waits: a signal that comes between the two is seen with the next key.
        """
        self.type(CTRL_C)
        if not select.select([self.end], [], [], 20)[0]:
            self.type(CTRL_C)
        return self.until(ending)

    def until(self, ending: str, timeout: float = 120) -> str:
        """All that is shown from now until `ending` is, the echo of what was typed included."""
        deadline = time.monotonic() + timeout
        while ending not in self.unread:
            assert select.select([self.end], [], [], max(deadline - time.monotonic(), 0))[0], self.unread
            self._read()
        said, _, self.unread = self.unread.partition(ending)
        return said

    def _read(self) -> None:
        """More of what is shown, without control sequences; however the terminal cuts it into pieces."""
        shown = self.unread + self._decoded(os.read(self.end, 4096))
        self.unread = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).replace("\r\n", "\n")


def as_shown(answer: str) -> str:
    """An answer as a terminal is sent it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", answer)


def _take_terminal() -> None:
    """Make the terminal the one that Ctrl-C comes from, and obey it, where the tests run in the background, too."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
