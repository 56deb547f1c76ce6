"""The command `accessory`: it becomes the script that a word names, from any directory."""

from __future__ import annotations

import json
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from accessory import __main__ as console
from accessory.errors import ConfigError
from tests.conftest import ROOT


def test_pip_installs_it() -> None:
    """The entry of pyproject.toml is `main`, and the names of the issue's commands are there."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["accessory"].partition(":")
    assert getattr(import_module(module), name) is console.main
    assert {
        "finetune", "ask", "chat", "evaluate", "merge", "convert", "quantize", "plan", "inspect",
    } <= console.COMMANDS.keys()  # fmt: skip


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_is_a_script(name: str) -> None:
    """That is there, and takes the words behind the command as they are."""
    command = console.COMMANDS[name]
    words = console.command_line(name, "--a", "b c", "--nprocs=2")
    assert words[1:] == [str(ROOT / command.script), "--a", "b c", "--nprocs=2"]


@pytest.mark.parametrize("given", [["--nproc", "2"], ["--nproc=2"]])
def test_several_processes(given: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By torchrun, once; the tools that have one process only say so."""
    monkeypatch.delenv("RANK", raising=False)
    words = console.command_line("finetune", "--seed", "1", *given, "--quant")
    script = str(ROOT / "accessory/main_finetune.py")
    assert words[1:] == [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, "--seed", "1", "--quant",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="accessory merge --nproc: it runs in one process"):
        console.command_line("merge", *given)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="a launcher has started this process already"):
        console.command_line("finetune", *given)


@pytest.mark.parametrize("number", ["0", "two", "-1", ""])
def test_numbers_of_processes_that_cannot_be(number: str) -> None:
    with pytest.raises(ConfigError, match=f"accessory ask --nproc '{number}': expected a number of processes"):
        console.command_line("ask", "--nproc", number)


@pytest.mark.parametrize(("word", "meant"), [
    ("finetun", "finetune"), ("evalute", "evaluate"), ("train", "finetune"), ("inference", "ask"),
    ("merge-lora", "merge"), ("export", "convert"),
])  # fmt: skip
def test_an_unknown_command_is_answered_with_the_nearest(word: str, meant: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        console.main([word, "--help"])
    assert end.value.code == ConfigError.status
    assert (
        f"accessory {word}: there is no such command. Did you mean {meant!r}? Known: finetune,"
        in capsys.readouterr().err
    )


def test_without_the_source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where only the package was installed."""
    monkeypatch.setattr(console, "ROOT", tmp_path)
    with pytest.raises(ConfigError, match=r"runs tools/merge\.py of Accessory's source tree, and .* is none"):
        console.command_line("merge")


def test_help_lists_every_command(capsys) -> None:
    for words in ([], ["--help"]):
        console.main(words)
        said = capsys.readouterr().out
        assert all(f"  {name} " in said and command.script in said for name, command in console.COMMANDS.items())
    console.main(["--version"])
    assert capsys.readouterr().out.strip() == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_from_another_directory(tiny_base: Path, tmp_path: Path, python) -> None:
    """Trains, and names what it trained; a fault's status is the script's, and a relative path is the user's."""
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": "a", "output": "b"}]))
    (tmp_path / "base").symlink_to(tiny_base)
    run = ("-m", "accessory", "finetune", "--pretrained_path", "base", "--data_config", "data.json", "--device", "cpu")
    how = {"cwd": tmp_path, "PYTHONPATH": str(ROOT)}
    done = python(*run, "--epochs", "1", "--output_dir", "out", **how)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("one process; --nproc N starts N of them")
    said = python("-m", "accessory", "inspect", "out/epoch0", **how)
    assert said.returncode == 0 and "Accessory" in said.stdout
    assert python(*run, "--lr", "fast", **how).returncode == ConfigError.status
