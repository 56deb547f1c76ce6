"""Trained parts of four layouts, and every demo by its command line: each asks in the layout of training by itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gradio import Blocks
from gradio_client import Client
from tokenizers import Tokenizer

from accessory.data.corpus import build_corpus
from accessory.meta import MetaModel, Sampling, answers
from accessory.parallel import groups
from tests.demos.terminals import Pty, as_shown
from tests.here import run_here

QUESTIONS = ("What is QST?", "Is it fast?")
ANSWERS = ("A side network.", "Yes, it is.")
SYSTEM = "Be kind."
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
FLAGS = ("--device", "cpu", "--dtype", "fp32", "--max_seq_len", 400, "--temperature", 0, "--max_gen_len", 6)


@dataclass(frozen=True)
class Part:
    """A trained part. data, dialog: what it was trained on. remembers: whether turns follow one another in its layout.

    written: its prompt of a question after earlier (question, answer) pairs, cut where training tokenizes it apart.
    """

    path: Path
    data: Path
    dialog: bool
    remembers: bool
    written: Callable[[list[tuple[str, str]], str], list[str]]


def chat(earlier: list[tuple[str, str]], question: str) -> list[str]:
    """The template `CHATML`, which begins documents itself."""
    said = "".join(f"<s>user: {asked}<s>assistant: {answer}<s>" for asked, answer in earlier)
    return [f"<s>system: {SYSTEM}{said}<s>user: {question}<s>assistant: "]


def dialog(earlier: list[tuple[str, str]], question: str) -> list[str]:
    """Upstream's conv_v1_2."""
    pieces = ["<s>", f"{SYSTEM}\n", "\n### Human:"]
    for asked, answer in earlier:
        pieces += [f" {asked}\n###", " Assistant:", f" {answer}\n###", " Human:"]
    return [*pieces, f" {question}\n###", " Assistant:"]


def alpaca(earlier: list[tuple[str, str]], question: str) -> list[str]:
    """Stanford's."""
    return [
        "<s>",
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{question}\n\n### Response:",
    ]


def plain(earlier: list[tuple[str, str]], question: str) -> list[str]:
    """The question alone."""
    return ["<s>", question]


def conversation(turns: str, who: str, said: str, roles: tuple[str, str, str]) -> dict[str, Any]:
    """A record with the words of the system and two turns."""
    words = [SYSTEM, *(each for pair in zip(QUESTIONS, ANSWERS, strict=True) for each in pair)]
    speakers = [roles[0], *roles[1:], *roles[1:]]
    return {turns: [{who: speaker, said: each} for speaker, each in zip(speakers, words, strict=True)]}


ASKED = [{"instruction": asked, "output": answer} for asked, answer in zip(QUESTIONS, ANSWERS, strict=True)]
TRAINED = {
    "chat": ([conversation("messages", "role", "content", ("system", "user", "assistant"))] * 3 + ASKED[:1],
             "prompt_type: chat", chat, True),
    "dialog": ([conversation("conversations", "from", "value", ("system", "human", "gpt"))] * 4, "", dialog, True),
    "alpaca": (ASKED * 2, "", alpaca, False),
    "none": ([{"text": f"{asked} {answer}"} for asked, answer in zip(QUESTIONS, ANSWERS, strict=True)] * 2,
             "", plain, False),
}  # fmt: skip
"""Layout -> records, what the YAML says of them, how a prompt is written, and whether it remembers."""


@pytest.fixture(scope="module")
def tokenizer(with_template: Path) -> Tokenizer:
    """Of the `tokenizers` library."""
    return Tokenizer.from_file(str(with_template / "tokenizer.json"))


@pytest.fixture(scope="module")
def parts(tiny_base: Path, with_template: Path, lora_config: Path, tmp_path_factory) -> dict[str, Part]:
    """One part of each layout, trained by the command; the base has a chat template in all cases."""
    made = {}
    for name, (records, settings, written, remembers) in TRAINED.items():
        folder = tmp_path_factory.mktemp(name)
        by_shape = {next(iter(record)): [] for record in records}
        for record in records:
            by_shape[next(iter(record))].append(record)
        entries = []
        for number, some in enumerate(by_shape.values()):
            (folder / f"{number}.json").write_text(json.dumps(some))
            entries.append(f"{{path: {number}.json, {settings}}}")
        data = folder / "data.yaml"
        data.write_text(f"META: [{', '.join(entries)}]")
        status = run_here(
            "accessory/main_finetune.py", "--pretrained_path", tiny_base, "--tokenizer_path", with_template,
            "--llama_type", "llama_peft", "--llama_config", lora_config, "--data_config", data, "--device", "cpu",
            "--max_steps", 1, "--batch_size", 2, "--accum_iter", 1, "--max_words", 300, "--lr", "1e-3",
            "--only_save_trainable", "--output_dir", folder / "out", *["--dialog"] * (name == "dialog"),
        )  # fmt: skip
        assert status == 0
        (path,) = (folder / "out").glob("epoch*")
        made[name] = Part(path, data, name == "dialog", remembers, written)
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of all prompts that models of this process are given, in their order."""
    seen, original = [], answers.generate_tokens

    def watched(decoder: object, prompts: list[list[int]], **how: object) -> Iterator:
        seen.extend(prompts)
        return original(decoder, prompts, **how)

    monkeypatch.setattr(answers, "generate_tokens", watched)
    return seen


def ids(tokenizer: Tokenizer, pieces: list[str]) -> list[int]:
    """Of a prompt; `<s>` begins a document or a turn."""
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False).ids]


def serving(monkeypatch: pytest.MonkeyPatch, use: Callable[[Client], None]) -> None:
    """Pages that are served from now on are given to `use`, and then closed."""

    def visit(page: Blocks) -> None:
        use(Client(page.local_url, verbose=False))
        page.close()

    monkeypatch.setattr(Blocks, "block_thread", visit)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_every_demo_asks_as_in_training(
    name: str, parts: dict[str, Part], tokenizer: Tokenizer, asked, monkeypatch, tmp_path: Path, capsys
) -> None:
    """Token for token, as written by hand; that is also what training learned an answer to."""
    part = parts[name]
    first = ids(tokenizer, part.written([], QUESTIONS[0]))
    corpus = build_corpus(part.data, MetaModel.from_pretrained(part.path).tokenizer, max_words=300, dialog=part.dialog)
    assert corpus.tokens[: len(first)].tolist() == first
    assert corpus.documents_by_prompt_layout() == {name: len(corpus)}
    model = ("--pretrained_path", part.path, *FLAGS)

    assert run_here("demos/single_turn.py", *model, "--prompt", *QUESTIONS) == 0
    assert asked == [ids(tokenizer, part.written([], question)) for question in QUESTIONS]

    asked.clear()
    serving(monkeypatch, lambda page: page.predict(QUESTIONS[0], "", api_name="/ask"))
    assert run_here("demos/single_turn.py", *model) == 0
    assert asked == [first]

    asked.clear()
    shown, settings = [], [] if part.remembers else [None]  # words of the system: the page has none to begin with
    ask = lambda page, question: shown.append(page.predict(question, *settings, api_name="/ask")[0])  # noqa: E731
    serving(monkeypatch, lambda page: [ask(page, question) for question in QUESTIONS])
    assert run_here("demos/multi_turn.py", *model) == 0
    answer = "".join(piece["text"] for piece in shown[0][1]["content"])
    earlier = [(QUESTIONS[0], answer.replace("&lt;", "<").replace("&amp;", "&"))] if part.remembers else []
    assert asked == [first, ids(tokenizer, part.written(earlier, QUESTIONS[1]))]

    asked.clear()
    (tmp_path / "asked.json").write_text(json.dumps(ASKED))
    line = ("--data", tmp_path / "asked.json", "--output", tmp_path / "told.jsonl", "--max_gen_len", 2)
    assert run_here("tools/predict.py", part.path, *line, "--device", "cpu") == 0
    assert asked == [ids(tokenizer, part.written([], question)) for question in QUESTIONS]
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert [each["reference"] for each in told] == list(ANSWERS)
    assert "--system_prompt" not in capsys.readouterr().err


def test_told_otherwise_by_a_flag(parts, tokenizer: Tokenizer, asked, monkeypatch, tmp_path: Path, capsys) -> None:
    """Every demo obeys, and says what the part was trained on."""
    model = ("--pretrained_path", parts["chat"].path, *FLAGS, "--system_prompt", "alpaca")
    (tmp_path / "asked.json").write_text(json.dumps(ASKED[:1]))
    data = ("--data", tmp_path / "asked.json", "--output", tmp_path / "told.jsonl", "--device", "cpu")
    commands = {
        "demos/single_turn.py": (*model, "--prompt", QUESTIONS[0]),
        "demos/multi_turn.py": model,
        "demos/single_model_cli.py": (*model, "--prompt", QUESTIONS[0]),
        "tools/predict.py": (parts["chat"].path, *data, "--max_gen_len", 1, "--system_prompt", "alpaca"),
    }
    serving(monkeypatch, lambda page: page.predict(QUESTIONS[0], None, api_name="/ask"))
    for command, arguments in commands.items():
        asked.clear()
        capsys.readouterr()
        assert run_here(command, *arguments) == 0
        assert asked == [ids(tokenizer, alpaca([], QUESTIONS[0]))], command
        assert "--system_prompt alpaca: the part was trained on questions laid out as chat" in capsys.readouterr().err


@pytest.mark.parametrize("name", TRAINED)
def test_the_terminal_asks_as_in_training(
    name: str, parts: dict[str, Part], tokenizer: Tokenizer, clean_environment
) -> None:
    """In a process and a terminal of its own: its answers are those to prompts written by hand."""
    part, earlier = parts[name], []
    groups.start("cpu")
    model = MetaModel.from_pretrained(part.path, dtype="fp32", max_seq_len=400)
    stop_ids = model.chat.stop_ids if name == "chat" else model.tokenizer.stop_ids
    with Pty(["demos/single_model_cli.py", "--pretrained_path", part.path, *FLAGS], clean_environment) as shell:
        said = shell.until("\n> ")
        assert f"prompt layout {name}. /help lists commands." in said
        assert ("Each question is asked alone" in said) != part.remembers
        for question in QUESTIONS:
            prompt = ids(tokenizer, part.written(earlier if part.remembers else [], question))
            (answer,) = model.whole_answers([prompt], stop_ids, Sampling.of(max_gen_len=6), [name == "dialog"])
            shell.type(f"{question}\n")
            assert f"\n{as_shown(answer)}\n" in shell.until("\n> ")
            earlier.append((question, answer))
        shell.leave()
