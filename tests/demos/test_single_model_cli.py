"""A conversation in a real terminal, on one rank and on ranks that the demo starts itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from accessory.config import TerminalConfig
from accessory.conversation import Conversation
from accessory.meta import MetaModel
from accessory.parallel import groups
from demos.loading import say_seed
from tests.demos.terminals import CTRL_C, Pty, as_shown

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "demos" / "single_model_cli.py"
QUESTIONS = ("What is QST?", "And the\nside network?", "Why?", "How fast?", "Thanks.")
FLAGS = ("--device", "cpu", "--dtype", "fp32", "--max_seq_len", "500", "--temperature", "0", "--max_gen_len", "9")
ROOM = ("--max_seq_len", "20000")
"""For an answer that does not end by itself while a test runs."""


@pytest.fixture(scope="module")
def talk(tiny_base: Path) -> Iterator[Conversation]:
    """The same conversation in this process."""
    groups.start("cpu")
    yield Conversation(MetaModel.from_pretrained(tiny_base, dtype="fp32", max_seq_len=500))
    groups.stop()


def answered(talk: Conversation, question: str) -> str:
    """The whole answer as a terminal shows it."""
    *_, answer = talk.ask(question, max_gen_len=9)
    return as_shown(answer)


def test_what_a_terminal_may_be_sent(tiny_base: Path, talk: Conversation, clean_environment, tmp_path: Path) -> None:
    """All commands in all their forms, and what is no question: it goes on after each, with what was said before."""
    talk.clear()
    (tmp_path / "there.json").write_text("")
    wanted = {question: answered(talk, question) for question in QUESTIONS[:1]}
    talk.system = "Be brief."
    wanted["Why?"] = answered(talk, "Why?")
    talk.system = None
    bell = "\x16\x07"  # Ctrl-V takes the next key as it is
    with Pty([DEMO, "--pretrained_path", tiny_base, *FLAGS], clean_environment) as shell:
        shell.until("\n> ")

        def says(keys: str | bytes, expected: str) -> None:
            shell.type(keys + (b"\n" if isinstance(keys, bytes) else "\n"))
            said = shell.until("\n> ")
            assert expected in said and "Traceback" not in said, (keys, said)

        says("/retry", "There is no turn to retry.")
        says("/undo", "There is no turn to take back.")
        says(f"/save {tmp_path / 'none.json'}", "Nothing has been said that could be saved.")
        says(QUESTIONS[0], f"\n{wanted[QUESTIONS[0]]}\n")
        says("x" * 10_000, "tokens; expected less than 500 (--max_seq_len)")
        says(b"\xff\xfe?", "half of a surrogate pair, which is no text")
        says(b"/\xff", r"ConfigError: command '/\udcff' is unknown.")
        for place, why in (
            ("/proc/none.json", "cannot be written (No such file or directory)"),
            (tmp_path, "cannot be written (File exists)"),
            (tmp_path / "there.json", "cannot be written (File exists)"),
            ("~nobody0/x", "cannot be written (Could not determine home directory.)"),
            ("", "/save needs the name of a file."),
        ):
            says(f"/save {place}", why)
        says("/system", "(those of the prompt layout)")
        says("/system Be brief.", "")
        says("/system", "\nBe brief.")
        says("Why?", f"\n{wanted['Why?']}\n")
        says("/system -", "")
        says("/set", "max_gen_len 9\n")
        says("/set stop \N{GRINNING FACE}", "")
        says("/set", "stop ('\N{GRINNING FACE}',)")
        says("/set stop", "")
        says("/help", "/save FILE        write the conversation as JSON")
        says(f"a{bell}b", "(cut off: /set max_gen_len)")
        says("/undo", "Taken back: a\N{REPLACEMENT CHARACTER}b")
        says(f"/save {tmp_path / 'talk.json'}", "Written to ")
        says("/set temperature 1", "")
        says("/retry", "\n(seed 1)")
        says("/set temperature 0", "")
        says("/clear", "")
        says("/retry", "There is no turn to retry.")
        shell.type("/exit\n")
        assert shell.process.wait(120) == 0
    ((record,),) = [json.loads((tmp_path / "talk.json").read_text())]
    assert [message["content"] for message in record["messages"][::2]] == [QUESTIONS[0], "Why?"]


def test_the_seed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Where answers are drawn."""
    for temperature, said in ((0.0, ""), (0.1, "answers are drawn by --seed 3\n")):
        say_seed(TerminalConfig(pretrained_path=["x"], temperature=temperature, seed=3))
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("ranks", [1, 2])
def test_five_turns_in_a_terminal(ranks: int, tiny_base: Path, talk: Conversation, clean_environment, tmp_path) -> None:
    """Lines and blocks of lines, commands, an answer that is stopped, and what is saved."""
    talk.clear()
    with Pty([DEMO, "--pretrained_path", tiny_base, "--n_gpus", str(ranks), *FLAGS, *ROOM], clean_environment) as shell:
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
        shell.type("/set max_gen_len 15000\n")  # which lasts until a key comes, however late
        shell.until("\n> ")
        shell.type("Never\\\nending?\n")
        shell.until("\n... ending?\n")
        shell.begun()
        shell.type(CTRL_C)
        assert shell.until("\n> ").endswith("\n(stopped)")
        assert "Ctrl-D leaves" in shell.interrupt_prompt("> ")
        shell.type("/clera\n")
        assert "Did you mean '/clear'?" in shell.until("\n> ")
        shell.type(f"/save {tmp_path / 'talk.json'}\n")
        shell.until("\n> ")
        shell.leave()
    ((record,),) = [json.loads((tmp_path / "talk.json").read_text())]
    said = record["messages"]
    assert said[:8] == talk.messages[:8] and len(said) in (8, 10)  # the stopped answer may have no words yet
    assert [message["content"] for message in said[8:9]] in ([], ["Never\nending?"])


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
