"""README and docs/ tell the truth: tables are what the code says, commands run as written, links lead somewhere.

From the repository's root, `python -m tests.test_docs` writes the tables anew.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path

import pytest

from accessory.checkpoint.source import Source
from accessory.checkpoint.strategy import MEASUREMENT, storages_of_mix
from accessory.config import (
    ChatPageConfig,
    DemoConfig,
    FinetuneConfig,
    ImageTerminalConfig,
    PretrainConfig,
    TerminalConfig,
)
from accessory.data.meta_config import load_data_config
from accessory.data.published import PUBLISHED
from accessory.data.shapes import SHAPES
from accessory.data.templates import CHAT, PROMPT_TYPES
from accessory.errors import AccessoryError
from accessory.export import export_side
from accessory.foreign_names import unknown
from accessory.method.peft import Peft
from accessory.method.side_settings import SideSettings
from accessory.parallel import groups
from demos.terminal import printable
from tests.checkpoint.trained import write_trained_side
from tests.conftest import DATA, ROOT, run_python
from tests.data.raw.texts import made, written
from tests.eval.published import write_published
from tests.exps.upstream import differences_table
from tests.flags_table import flags_table, settings_table
from tests.model.families.matrix import FAMILIES_TABLE
from tests.runs import SUPPORT
from tests.support import SupportTable
from tests.vision.tiny import write_seen

README = "README.md"
PAGES = {name: (ROOT / name).read_text() for name in
         (README, *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))}  # fmt: skip
SETUP = ("bash exps/quickstart.sh", "bash tests/run.sh")
TRAINED = "output/mine/epoch2"
"""What README's runs leave, and the commands of other pages begin with."""
PARTS = re.compile(r"(output/(?:mine|side|seeing))/epoch2")
"""What any run leaves."""
OTHERS_FLAGS = {
    "nnodes", "rdzv-id", "rdzv-backend", "rdzv-endpoint", "nproc-per-node", "max-restarts", "nodes", "time", "jinja",
    "repo-type", "local-dir", "include",
}  # fmt: skip
"""Of torchrun, sbatch, llama-server and hf."""
OTHERS_FILES = {f"accessory/{name}/" for name in ("configs", "exps", "demos", "tools")} | {
    "tools/convert_weights_to_hf.py", "tools/weight_operate.py", "docs/gguf.md",
}  # fmt: skip
"""Paths in LLaMA2-Accessory and ggml."""


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, text) of each code block in a language."""
    return [(name, text) for name, page in PAGES.items()
            for text in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)]  # fmt: skip


COMMANDS = [line for _, text in blocks("bash") for line in text.splitlines() if line]


# Tables that the code makes


def printed(name: str) -> Callable[[str], str]:
    """What the planner's command before the table prints."""

    def table(_: str) -> str:
        before = "\n".join(PAGES.values()).partition(f"<!-- {name} -->")[0]
        command = shlex.split(re.findall(r"`python (tools/plan\.py [^`]+)`", before)[-1])
        return run_python(ROOT / command[0], *command[1:]).stdout.strip()

    return table


def counted(*command: str) -> Callable[[str], str]:
    """What tools/launches.py prints, each cell with the earlier figures that stand there in parentheses."""

    def table(now: str) -> str:
        found = run_python(ROOT / "tools" / "launches.py", *command).stdout.strip().splitlines()
        lines = zip_longest(found, now.splitlines()[: len(found)], fillvalue="")
        return "\n".join("|".join(map(_beside_earlier, *_cells(new, old))) for new, old in lines)

    return table


def _cells(new: str, old: str) -> tuple[list[str], list[str]]:
    cells = new.split("|")
    return cells, (old.split("|") + [""] * len(cells))[: len(cells)]


def _beside_earlier(cell: str, old: str) -> str:
    earlier = re.search(r" \(.*\) ", old)
    return cell.rstrip() + earlier[0] if earlier else cell


def rows_and_columns(table: SupportTable) -> Callable[[str], str]:
    """Those of a support table; what its cells say is left to the tests that they stand for."""
    return lambda now: table.filled(table.states(now))


def names_table(now: str) -> str:
    """The rows' names as they are, each with what an unknown flag of that name is answered; one row an answer."""
    kinds = [[f"--{name}" for name in config.model_fields] for config in (FinetuneConfig, DemoConfig)]
    answers: dict[str, list[str]] = {}
    for name in re.findall(r"`(\w+)`(?=[^|\n]*\|[^|\n]*\|$)", now, re.MULTILINE):
        answer = next((said for flags in kinds if (said := unknown(name, (), flags)) != "."), None)
        assert answer, f"{name!r} is not in accessory/foreign_names.py"
        answers.setdefault(answer[2:-1], []).append(name)
    rows = [f"| {', '.join(f'`{name}`' for name in names)} | {_in_code(answer)} |" for answer, names in answers.items()]
    return "\n".join(["| there | here |", "|---|---|", *rows])


def _in_code(sentence: str) -> str:
    return re.sub(r'(--[a-z][a-z0-9_-]*(?:=N| latest| int8)?|\{.*?\}|"\w+"(?:: true)?)', r"`\1`", sentence)


def published_table(_: str) -> str:
    """The data sets that are known by name."""
    rows = []
    for name, data in PUBLISHED.items():
        files = ", ".join(f"`{file}`" for file in data.files)
        rows.append(f"| `{name}` | {data.what} | {data.shape} | {data.hub or data.url} | {files} |")
    return "\n".join(["| name | data | shape | published as | files |", "|---|---|---|---|---|", *rows])


def shapes_table(_: str) -> str:
    """The shapes of records."""
    rows = ["| shape | keys | what | laid out as |", "|---|---|---|---|"]
    for name, shape in SHAPES.items():
        keys = ", ".join(f"`{key}`" for key in shape.keys)
        layout = "as it stands" if shape.is_text else shape.layout
        rows.append(f"| {name} | {keys} | {shape.what} | {layout} |")
    return "\n".join(rows)


TABLES: dict[str, Callable[[str], str]] = {
    "flags": lambda _: flags_table(FinetuneConfig),
    "pretrain-flags": lambda _: flags_table(PretrainConfig, FinetuneConfig),
    "demo-flags": lambda _: flags_table(DemoConfig),
    "terminal-flags": lambda _: flags_table(TerminalConfig, DemoConfig),
    "chat-page-flags": lambda _: flags_table(ChatPageConfig, DemoConfig),
    "image-flags": lambda _: flags_table(ImageTerminalConfig, TerminalConfig),
    "side-settings": lambda _: settings_table(SideSettings),
    "published": published_table,
    "shapes": shapes_table,
    "scripts": lambda _: differences_table(),
    "families": rows_and_columns(FAMILIES_TABLE),
    "support": rows_and_columns(SUPPORT),
    **{name: printed(name) for name in ("plan", "plan of 16 x 384", "plan of 1 x 512", "plan of images")},
    "launches of a block": counted("block"),
    "launches of a token": counted("token"),
    "launches of a token by family": counted("families"),
    "launches of a step": counted("steps"),
    "launches of a step without Triton": counted("steps", "--triton", "False"),
    **{f"names of {trainer}": names_table for trainer in ("LLaMA2-Accessory", "qlora", "peft", "Axolotl")},
}
"""What stands between two markers -> what must stand there."""


def between(name: str) -> str:
    """What stands between two markers, on whichever page."""
    (found,) = re.findall(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", "\n".join(PAGES.values()), re.DOTALL)
    return found


SLOW = [pytest.param(name, marks=pytest.mark.slow if name.startswith(("plan", "launches")) else ()) for name in TABLES]
"""The planner builds models of 70B, and launches are counted by running steps."""


@pytest.mark.parametrize("name", SLOW)
def test_table_is_what_the_code_says(name: str) -> None:
    assert between(name) == TABLES[name](between(name)), "python -m tests.test_docs writes it anew"


def write_tables() -> None:
    """Put each table into its page."""
    for page, text in PAGES.items():
        for name in re.findall(r"<!-- ([^/].*?) -->", text):
            if name in TABLES:
                first, last = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
                before, _, rest = text.partition(first)
                text = before + first + TABLES[name](between(name)) + last + rest.partition(last)[2]
        (ROOT / page).write_text(text)


# Words and numbers that must agree with the code


def test_promises_are_those_of_the_fault_tests() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests" / "faults").glob("test_*.py"))
    promised = [int(n) for row in re.findall(r"^\| ([\d, ]+) \|", between("promises"), re.MULTILINE)
                for n in row.split(",")]  # fmt: skip
    assert promised == sorted({int(number) for number in re.findall(r"^def test_(\d\d)_", tests, re.MULTILINE)})


def test_statuses_are_those_of_the_errors() -> None:
    def statuses(kind: type[AccessoryError]) -> set[int]:
        return {kind.status}.union(*map(statuses, kind.__subclasses__()))

    assert [int(row) for row in re.findall(r"^\| (\d+) \|", between("statuses"), re.MULTILINE)] == sorted(
        {0, *statuses(AccessoryError)}
    )


def test_quickstart_answers_are_those_of_its_data() -> None:
    questions = re.findall(r'"([^"]+)"', re.search(r"QUESTIONS=\((.*)\)", (ROOT / "exps/quickstart.sh").read_text())[1])
    records = json.loads(DATA.read_text())
    learned = {record["instruction"]: record["output"] for record in records}
    after = between("quickstart").partition("== after")[2]
    assert re.findall(r"Q: (.*)\nA: (.*)", after) == [(question, learned[question]) for question in questions]
    assert f"on {len(records)} questions and answers" in PAGES[README]


def test_settings_that_pages_show_are_read(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("my_data.json", "faq.csv", "logs/a.jsonl.gz", "book.txt"):
        (tmp_path / name).write_text("[]")
    for _, text in blocks("yaml"):
        (tmp_path / "data.yaml").write_text(text)
        assert load_data_config(tmp_path / "data.yaml")[0].path == tmp_path / "my_data.json"
    assert all(name in text for name in (*PROMPT_TYPES, CHAT))
    for page, text in blocks("json"):
        if MEASUREMENT in (content := json.loads(text)):
            (tmp_path / "quant_strategy.json").write_text(text)
            mixed = Source(tmp_path, "", [], {"layers.0.attention.wq.weight": None})
            assert {kind.name for kind in storages_of_mix([mixed], "mix2.5").values()} == {"int2_g64"}
        else:
            assert page == README or Peft.Settings(**content).lora_rank > 0
    for key in Peft.Settings.model_fields:
        assert re.search(rf'[`"]{key}[`"]', PAGES["docs/methods.md"]), key


def test_flags_that_pages_name_exist() -> None:
    files = [*(ROOT / "tools").glob("*.py"), ROOT / "tests/run.sh", ROOT / "accessory/__main__.py"]
    sources = "\n".join(path.read_text() for path in files)
    configs = (FinetuneConfig, PretrainConfig, DemoConfig, ImageTerminalConfig, ChatPageConfig)
    known = OTHERS_FLAGS.union({"help"}, *(config.model_fields for config in configs))
    for page, text in PAGES.items():
        for name in set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)) - known:
            assert re.search(rf"(^ +|--){name}\b", sources, re.MULTILINE), f"{page}: --{name}"


# Pages and where they lead


def test_readme_is_short_and_lists_every_page() -> None:
    assert PAGES[README].count("\n") <= 150
    listed = re.findall(r"^- \[(docs/[\w-]+\.md)\]\(\1\): ", PAGES[README], re.MULTILINE)
    assert sorted(listed) == [page for page in PAGES if page != README]


@pytest.mark.parametrize("page", PAGES)
def test_page_says_what_it_answers_and_leads_to_what_is_there(page: str) -> None:
    text, folder = PAGES[page], (ROOT / page).parent
    assert page == README or re.match(r"# .*\n\nThis page answers: [^.]*\?\n\n", text)
    for target in re.findall(r"\]\(([^)]+)\)", re.sub("```.*?```", "", text, flags=re.DOTALL)):
        assert (folder / target).is_file(), f"{page}: {target}"
    places = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "output")
    elsewhere = OTHERS_FILES | set(re.findall(r"^# (\S+\.py)$", text, re.MULTILINE))  # what its examples would make
    for path in re.findall(rf"(?<![\w./-])((?:{places})/[\w./-]*\w/?)", text):
        assert (ROOT / path).exists() or path in elsewhere, f"{page}: {path}"


def test_pages_that_the_code_names_are_there() -> None:
    for folder in ("accessory", "demos", "exps", "tools", "tests"):
        for path in (file for kind in ("*.py", "*.sh") for file in (ROOT / folder).rglob(kind)):
            for page in re.findall(r"docs/[\w-]+\.md", path.read_text()):
                assert page in PAGES or page in OTHERS_FILES, f"{path}: {page}"


# Commands


def test_the_two_commands_come_first() -> None:
    assert tuple(command.split("   ")[0].strip() for command in COMMANDS[:2]) == SETUP
    for command in SETUP:
        assert (ROOT / command.split()[1]).is_file()


def test_no_command_stands_twice() -> None:
    assert len(set(COMMANDS)) == len(COMMANDS)


@pytest.fixture(scope="module")
def workshop(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory laid out as the commands expect: accessory/ and the rest, BASE, DATA.json, RELEASED, ..."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("accessory", "demos", "exps", "configs", "tools"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "BASE").symlink_to(tiny_base)
    (folder / "DATA.json").write_text(next(text for page, text in blocks("json") if page == README))
    write_published(folder / "TASKS")
    (folder / "VALIDATION.json").write_text(json.dumps(json.loads(DATA.read_text())[:8]))
    (folder / "TEXT.txt").write_text(DATA.read_text())
    (folder / "NEW.json").write_text('{"dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 128}')
    for name in ("PART", "VALIDATION"):
        written(folder / f"{name}.jsonl", made(40))
    (folder / "FILES.json").write_text('["TEXT.txt", "PART.jsonl", "VALIDATION.jsonl"]')
    (folder / "lora.json").write_text('{"lora_rank": 16}')
    (folder / "side.json").write_text('{"start": "released"}')
    (folder / "vision.json").write_text('{"lora_rank": 16, "vision_tuning": true}')
    if find_spec("PIL"):
        write_seen(folder)
    side = write_trained_side(tiny_base, tmp_path_factory.mktemp("side") / "part", start="released")
    export_side([side], folder / "RELEASED")
    return folder


def train(workshop: Path, part: str = TRAINED) -> None:
    """What the first run that writes `part` leaves, where a test is run alone."""
    if not (workshop / part).is_dir():
        run = next(command for command in COMMANDS if f"--output_dir {part.removesuffix('/epoch2')}" in command)
        assert run_python(*shlex.split(run)[1:], cwd=workshop).returncode == 0


@pytest.mark.parametrize("command", COMMANDS[2:], ids=lambda command: command[:60])
def test_command(command: str, workshop: Path, shell, called, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, but for the number of GPUs (two processes here) and nodes (one), and what takes a GPU or minutes.

    What `python` runs is run in this process.
    """
    command = command.replace("--nproc-per-node=8", "--nproc-per-node=2").replace("--nnodes=2", "--nnodes=1")
    command = command.replace("HOST:29400", "localhost:0")
    few = "--rows 8 --own_rows 8 --row_tokens 32 --distill_steps 2"
    command = command.replace("--calibrate DATA.json", f"--calibrate TEXT.txt {few}")
    command = command.replace("--model 7B --tokens 4096 --seq 512", "--model tiny --tokens 128 --seq 64")
    if "main_pretrain" in command:
        command += " --max_words 64 --max_steps 2 --val_rows 4 --precision fp32"
        if "output/packed/" in command and not (workshop / "output" / "packed").is_dir():
            pack = next(line for line in COMMANDS if "pack_data" in line)
            assert run_python(*shlex.split(pack)[1:], cwd=workshop).returncode == 0
    if "--tasks" in command:
        pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    if re.search(r"_path BLIP2|IMAGE|_mm\b", command):
        pytest.importorskip("PIL", reason="the extra vision is not installed")
    for part in PARTS.finditer(command):
        train(workshop, part[0])
    outputs = re.findall(r"--output_dir (output/\w+)", command)
    for output in outputs:  # each is another way to begin the same run
        shutil.rmtree(workshop / output, ignore_errors=True)
    if command.startswith("python "):
        monkeypatch.chdir(workshop)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
        done = called(*shlex.split(command)[1:])
        groups.stop()
    else:
        done = shell(command, cwd=workshop)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    assert bool(outputs) == ("main_finetune" in command or "main_pretrain" in command)
    last = "epoch0-iter2/model.safetensors" if "main_pretrain" in command else "epoch2/trainable.safetensors"
    assert all((workshop / output / last).is_file() for output in outputs)
    made = {"base-nf4", "base-mix2.5", "model.gguf", "merged", "adapter", "qst"}
    for target in made & {Path(word).name for word in shlex.split(command)}:
        assert (workshop / "output" / target).exists()
    if "single_turn" in shlex.split(command)[1]:
        assert "A: " in done.stdout


QUESTION = "What is the capital of France?"
LEAVES = {"save_qst_state": "side", "finetune(config)": "python/epoch2", "Trainer(": "trainer/checkpoint-3"}
"""What examples that call this leave in output/: a trained part."""


@pytest.mark.parametrize(("page", "example"), [b for b in blocks("python") if b[0] != "docs/extending.md"])
def test_python_example(page: str, example: str, workshop: Path, python) -> None:
    """Those that ask give the answer that the demo gives; those that train leave a trained part."""
    if "IMAGE" in example:
        pytest.importorskip("PIL", reason="the extra vision is not installed")
    for part in {TRAINED, *(part[0] for part in PARTS.finditer(example))}:
        train(workshop, part)
    done = python("-c", example, cwd=workshop, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    if left := [place for call, place in LEAVES.items() if call in example]:
        assert (workshop / "output" / left[0] / "trainable.safetensors").is_file()
    elif "train=True" in example:
        check_own_loop([float(line) for line in done.stdout.splitlines()], workshop, python)
    elif f'question("{QUESTION}")' in example and "MultiGpuWrapper" not in example:  # two ranks round otherwise
        flags = ("--prompt", QUESTION, "--temperature", "0", "--max_gen_len", "64")
        asked = python(ROOT / "demos" / "single_turn.py", "--pretrained_path", workshop / TRAINED, *flags)
        assert asked.stdout == f"Q: {QUESTION}\nA: {printable(done.stdout)}\n"


def check_own_loop(losses: list[float], workshop: Path, python) -> None:
    """The losses are those of the engine with the same settings, and what was saved can be asked."""
    given = "--llama_type llama_peft --llama_config lora.json --pretrained_path BASE --data_config DATA.json --quant "
    given += "--only_save_trainable --batch_size 4 --accum_iter 1 --lr 1e-3 --lr_schedule constant --warmup_epochs 0 "
    given += "--weight_decay 0 --clip_grad 1 --max_words 512 --epochs 3 --output_dir output/twin"
    assert python(ROOT / "accessory" / "main_finetune.py", *given.split(), cwd=workshop).returncode == 0
    log = (workshop / "output" / "twin" / "log.jsonl").read_text().splitlines()
    assert losses == pytest.approx([json.loads(line)["loss"] for line in log], rel=1e-4)
    saved = workshop / "output" / "own"
    asked = python(ROOT / "demos" / "single_turn.py", "--pretrained_path", saved, "--prompt", QUESTION)
    assert asked.returncode == 0, asked.stderr


if __name__ == "__main__":
    write_tables()
