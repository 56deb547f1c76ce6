"""A conversation in a real terminal, on one rank and on ranks that the demo starts itself."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from accessory.conversation import Conversation
from accessory.meta import MetaModel
from accessory.parallel import groups

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "demos" / "single_model_cli.py"
QUESTIONS = ("What is QST?", "And the\nside network?", "Why?", "How fast?", "Thanks.")
FLAGS = ("--device", "cpu", "--dtype", "fp32", "--max_seq_len", "500", "--temperature", "0", "--max_gen_len", "9")
CTRL_C, CTRL_D = "\x03", "\x04"


class Pty:
    """A program with a terminal of its own."""

    def __init__(self, arguments: list[str | Path], environment: dict[str, str]) -> None:
        self.end, theirs = pty.openpty()
        self.said = ""
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=environment | {"TERM": "dumb"}, stdin=theirs, stdout=theirs,
            stderr=theirs, start_new_session=True, preexec_fn=take_terminal,
        )  # fmt: skip
        os.close(theirs)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self.end, text.encode())

    def begun(self) -> None:
        """Wait for anything to be shown."""
        self.said += os.read(self.end, 1).decode(errors="replace")

    def until(self, ending: str, timeout: float = 120) -> str:
        """All that is shown from now until `ending` is, the echo of what was typed included."""
        deadline = time.monotonic() + timeout
        while not self.said.endswith(ending):
            assert time.monotonic() < deadline, self.said
            self.said += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self.end, 4096).decode()).replace("\r\n", "\n")
        said, self.said = self.said.removesuffix(ending), ""
        return said


def take_terminal() -> None:
    """Make the terminal the one that Ctrl-C comes from, and obey it, where the tests run in the background, too."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def talk(tiny_base: Path) -> Iterator[Conversation]:
    """The same conversation in this process."""
    groups.start("cpu")
    yield Conversation(MetaModel.from_pretrained(tiny_base, dtype="fp32", max_seq_len=500))
    groups.stop()


def answered(talk: Conversation, question: str) -> str:
    """The whole answer as a terminal shows it."""
    *_, answer = talk.ask(question, max_gen_len=9)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", answer)


@pytest.mark.parametrize("ranks", [1, 2])
def test_five_turns_in_a_terminal(ranks: int, tiny_base: Path, talk: Conversation, clean_environment, tmp_path) -> None:
    """Lines and blocks of lines, commands, an answer that is stopped, and what is saved."""
    talk.clear()
    shell = Pty([DEMO, "--pretrained_path", tiny_base, "--n_gpus", str(ranks), *FLAGS], clean_environment)
    try:
        assert "prompt layout dialog. /help lists commands.\n" in shell.until("\n> ") + "\n"
        for question in QUESTIONS:
            first, *more = question.split("\n")
            shell.type(f'"""{first}\n' + "".join(f"{line}\n" for line in more) + '"""\n' if more else f"{first}\n")
            wanted = answered(talk, question)
            said = shell.until("\n> ")
            assert f"\n{wanted}\n(cut off: /set max_gen_len)" in said, (said, wanted)
        shell.type("/retry\n")
        assert f"\n{wanted}\n(cut off" in shell.until("\n> ")
        shell.type("/undo\n")
        assert f"Taken back: {QUESTIONS[-1]}" in shell.until("\n> ")
        shell.type("/set temperature hot\n")
        assert "ConfigError: /set: 'temperature' is 'hot': Input should be a valid number" in shell.until("\n> ")
        shell.type("/set max_gen_len 300\n")
        shell.until("\n> ")
        shell.type("Never\\\nending?\n")
        shell.until("\n... ending?\n")
        shell.begun()
        shell.type(CTRL_C)
        assert shell.until("\n> ").endswith("\n(stopped)")
        shell.type(CTRL_C)
        assert "Ctrl-D leaves" in shell.until("> ")
        shell.type("/clera\n")
        assert "Did you mean '/clear'?" in shell.until("\n> ")
        shell.type(f"/save {tmp_path / 'talk.json'}\n")
        shell.until("\n> ")
        shell.type(CTRL_D)
        assert shell.process.wait(30) == 0
    finally:
        shell.process.kill()
        os.close(shell.end)
    ((record,),) = [json.loads((tmp_path / "talk.json").read_text())]
    said = record["messages"]
    assert [message["content"] for message in said[0::2]] == [*QUESTIONS[:4], "Never\nending?"]
    assert said[:8] == talk.messages[:8] and 0 < len(said[9]["content"]) < 2000


def test_questions_of_a_flag(tiny_base: Path, talk: Conversation, torchrun, python) -> None:
    """One after the other, each after the ones before; the system's words count; a fault is told once."""
    talk.clear()
    talk.system = "Be brief."
    wanted = "".join(
        f"> {question}\n{answered(talk, question)}\n(cut off: /set max_gen_len)\n" for question in ("A?", "B?")
    )
    talk.system = None
    asked = ("--prompt", "A?", "B?", "--system", "Be brief.")
    done = torchrun(2, DEMO, "--pretrained_path", tiny_base, *FLAGS, *asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout == wanted
    done = python(DEMO, "--pretrained_path", tiny_base, *FLAGS, "--n_gpus", "2", "--system_prompt", "chat")
    assert done.returncode == 3 and done.stderr.count("the checkpoint has no chat template") == 1
    done = python(DEMO, "--pretrained_path", tiny_base, "--n_gpus", "2", "--gpu_ids", "1", "1", "1")
    assert "--n_gpus 2 contradicts --gpu_ids, which are 3" in done.stderr and "names a GPU twice" in done.stderr
