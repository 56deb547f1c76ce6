"""README tells the truth: its tables are what the code says, its commands run as written."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

from accessory.config import DemoConfig, FinetuneConfig, flags_table
from tests.model.families.matrix import families_table

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
]
SETUP = ("bash exps/quickstart.sh", "bash tests/run.sh")


def between(name: str) -> str:
    """What stands between two markers."""
    return re.search(rf"<!-- {name} -->\n(.*?)\n?<!-- /{name} -->", README, re.DOTALL)[1]


def test_flags_are_those_of_the_entry() -> None:
    assert between("flags") == flags_table(FinetuneConfig)
    assert between("demo-flags") == flags_table(DemoConfig)


def test_memory_table_is_what_the_planner_prints(python) -> None:
    done = python(ROOT / "tools" / "plan.py", "table", "--seq", "512")
    assert done.stdout.strip() == between("plan").strip()


def test_support_table_is_what_the_layout_tests_run() -> None:
    spec = importlib.util.spec_from_file_location("layout_tests", ROOT / "tests" / "test_finetune.py")
    layout_tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layout_tests)
    assert between("support") == layout_tests.support_table()


def test_models_are_those_of_the_family_tests() -> None:
    assert between("families") == families_table()


def test_the_two_commands_come_first() -> None:
    assert tuple(command.split("   ")[0].strip() for command in COMMANDS[:2]) == SETUP
    for command in SETUP:
        assert (ROOT / command.split()[1]).is_file()


@pytest.fixture(scope="module")
def workshop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory laid out as README's commands expect: accessory/ and the rest, BASE, DATA.json, lora.json, ..."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("accessory", "demos", "exps", "configs", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "BASE").symlink_to(tiny_base)
    (folder / "DATA.json").write_text(
        '[{"instruction": "What is the capital of France?", "input": "", "output": "Paris."}]'
    )
    (folder / "lora.json").write_text('{"lora_rank": 16}')
    return folder


@pytest.mark.parametrize("command", COMMANDS[2:], ids=lambda command: command[:60])
def test_command(command: str, workshop: Path, shell) -> None:
    """As written, but for the number of GPUs (two processes here) and of nodes (one), and what only a GPU can hold."""
    command = command.replace("--nproc-per-node=8", "--nproc-per-node=2").replace("--nnodes=2", "--nnodes=1")
    command = command.replace("HOST:29400", "localhost:0")
    command = command.replace("--model 7B --tokens 4096 --seq 512", "--model tiny --tokens 128 --seq 64")
    if "main_finetune" in command:  # each is another way to begin the same run
        shutil.rmtree(workshop / "output" / "mine", ignore_errors=True)
    done = shell(command, cwd=workshop)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    if "main_finetune" in command:
        assert (workshop / "output" / "mine" / "epoch2" / "trainable.safetensors").is_file()
    for target in {"base-nf4", "model.gguf", "merged", "adapter"} & {Path(word).name for word in shlex.split(command)}:
        assert (workshop / "output" / target).exists()
    if "single_turn" in shlex.split(command)[1]:
        assert "A: " in done.stdout


def test_python_example(workshop: Path, python) -> None:
    """What the commands above left is asked as the demo asks it."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    part = workshop / "output" / "mine" / "epoch2"
    if not part.is_dir():  # this test alone
        run = next(command for command in COMMANDS if "main_finetune" in command)
        assert python(*shlex.split(run)[1:], cwd=workshop).returncode == 0
    done = python("-c", example, cwd=workshop, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    flags = ("--prompt", "What is the capital of France?", "--temperature", "0", "--max_gen_len", "64")
    asked = python(ROOT / "demos" / "single_turn.py", "--pretrained_path", part, *flags)
    assert asked.stdout == f"Q: What is the capital of France?\nA: {done.stdout}\n"
