"""The demo answers in the terminal, over several ranks, and on a page."""

from __future__ import annotations

import json
import re
import socket
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import pytest
from gradio_client.exceptions import AppError

from accessory.data.templates import format_prompt
from accessory.meta import MetaModel, answers
from accessory.parallel import groups
from demos.terminal import printable
from tests.browser import Browser, usable
from tests.checkpoint.trained import write_trained_side
from tests.demos.pages import served as served_by

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = ROOT / "demos" / "single_turn.py"
QUESTION = "What is QST?"


@pytest.fixture(scope="module")
def trained(tiny_base: Path, lora_config: Path, tmp_path_factory: pytest.TempPathFactory, python) -> Path:
    """A trained part of a 4-bit tiny base."""
    output = tmp_path_factory.mktemp("trained")
    done = python(
        ROOT / "accessory" / "main_finetune.py", "--pretrained_path", tiny_base, "--llama_type", "llama_peft",
        "--llama_config", lora_config, "--data_config", ROOT / "data_example" / "accessory_qa.json", "--device", "cpu",
        "--quant", "--only_save_trainable", "--max_words", "160", "--max_steps", "6", "--lr", "1e-2",
        "--warmup_epochs", "0", "--output_dir", output,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return next(output.glob("epoch*"))


@pytest.fixture(scope="module")
def expected(trained: Path) -> str:
    """The greedy answer, from the model in this process."""
    groups.start("cpu")
    model = MetaModel.from_pretrained(trained, max_seq_len=300)
    return model.generate([format_prompt(QUESTION)], max_gen_len=12)[0]


GREEDY = ("--device", "cpu", "--temperature", "0", "--max_gen_len", "12", "--max_seq_len", "300", "--prompt", QUESTION)


def answer_in(output: str) -> str:
    """What stands behind `A: `."""
    return re.search(r"^A: (.*)\n\n\Z", output, re.DOTALL | re.MULTILINE)[1]


def test_trained_part_alone(trained: Path, expected: str, python) -> None:
    done = python(DEMO, "--pretrained_path", trained, *GREEDY)
    assert done.returncode == 0, done.stderr
    assert answer_in(done.stdout) == printable(expected)
    refused = python(DEMO, "--pretrained_path", trained, *GREEDY, " ")
    assert refused.returncode == 2 and "ConfigError: The question is empty." in refused.stderr and not refused.stdout


def test_asked_as_it_was_trained(tiny_base: Path, lora_config: Path, tmp_path: Path, python) -> None:
    """Of two layouts that of most documents is used, with a note; a layout that training lacked gets a note, too."""
    records = json.loads((ROOT / "data_example" / "accessory_qa.json").read_text())
    (tmp_path / "few.json").write_text(json.dumps(records[:2]))
    (tmp_path / "most.json").write_text(json.dumps(records[2:9]))
    (tmp_path / "data.yaml").write_text("META: [{path: few.json}, {path: most.json, prompt_type: none}]")
    done = python(
        ROOT / "accessory" / "main_finetune.py", "--pretrained_path", tiny_base, "--llama_type", "llama_peft",
        "--llama_config", lora_config, "--data_config", tmp_path / "data.yaml", "--device", "cpu",
        "--only_save_trainable", "--max_words", "160", "--max_steps", "1", "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (part,) = (tmp_path / "out").glob("epoch*")
    model = MetaModel.from_pretrained(part, max_seq_len=300)
    expected = model.generate([QUESTION], max_gen_len=12)[0]
    as_alpaca = model.generate([format_prompt(QUESTION)], max_gen_len=12)[0]
    assert expected != as_alpaca
    done = python(DEMO, "--pretrained_path", part, *GREEDY)
    assert answer_in(done.stdout) == printable(expected)
    assert "laid out as none, alpaca; these are asked as none (--system_prompt)" in done.stderr
    done = python(DEMO, "--pretrained_path", part, "--system_prompt", "alpaca", *GREEDY)
    assert answer_in(done.stdout) == printable(as_alpaca)
    done = python(DEMO, "--pretrained_path", part, "--system_prompt", "shortqa", *GREEDY)
    assert "--system_prompt shortqa: the part was trained on questions laid out as none, alpaca" in done.stderr


def test_base_and_trained_part(trained: Path, tiny_base: Path, expected: str, python) -> None:
    done = python(DEMO, "--pretrained_path", tiny_base, trained, "--quant", *GREEDY)
    assert answer_in(done.stdout) == printable(expected)


def test_base_alone_answers_otherwise(tiny_base: Path, expected: str, python) -> None:
    done = python(DEMO, "--pretrained_path", tiny_base, "--quant", *GREEDY)
    assert done.returncode == 0, done.stderr
    assert answer_in(done.stdout) != expected


def test_two_ranks_give_one_answer(trained: Path, torchrun) -> None:
    done = torchrun(2, DEMO, "--pretrained_path", trained, *GREEDY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("A: ") == 1
    assert answer_in(done.stdout)


def test_a_side_network_alone(tiny_base: Path, tmp_path: Path, python, torchrun) -> None:
    """It knows its base, and answers over two ranks as over one, from caches of its own; the base answers otherwise."""
    part = write_trained_side(tiny_base, tmp_path / "side", r=2, side_heads=2, tail=1)
    groups.start("cpu")
    prompt = [format_prompt(QUESTION)]
    expected, plain = (
        MetaModel.from_pretrained(path, max_seq_len=300, dtype="fp32").generate(prompt, max_gen_len=12)[0]
        for path in (part, tiny_base)
    )
    assert expected != plain
    for done in (
        python(DEMO, "--pretrained_path", part, *GREEDY, "--dtype", "fp32"),
        torchrun(2, DEMO, "--pretrained_path", part, *GREEDY, "--dtype", "fp32"),
    ):
        assert done.returncode == 0, done.stderr
        assert answer_in(done.stdout) == printable(expected)


def served(part: Path, environment: dict[str, str], ranks: int = 1, longest: int = 300) -> AbstractContextManager:
    """The page of a trained part, and a client of it."""
    return served_by(DEMO, environment, "--pretrained_path", part, "--max_seq_len", longest, ranks=ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_page(ranks: int, trained: Path, expected: str, clean_environment) -> None:
    """The page answers as the terminal does, holds its limits on the server, and binds loopback only."""
    with served(trained, clean_environment, ranks) as (page, client):
        ask = lambda *settings: client.predict(QUESTION, "", "alpaca", *settings, api_name="/ask")  # noqa: E731
        answers = [ask(12, 0, 1), ask(12, 0, 1)]
        assert answers[0] == answers[1]
        assert ranks > 1 or answers[0] == expected
        with pytest.raises(AppError, match="Max length is 1000000; expected 1 to 300"):
            ask(10**6, 0, 1)
        with pytest.raises(AppError, match=r"The question has \d+ tokens; expected less than 300 \(--max_seq_len\)"):
            client.predict("x" * 10_000, "", "alpaca", 12, 0, 1, api_name="/ask")
        with pytest.raises(AppError, match="The question is empty"):
            client.predict("", "", "alpaca", 12, 0, 1, api_name="/ask")
        assert ask(12, 0, 1) == answers[0]
    said = page.stdout.read().partition("Received 15 death signal")[0]  # torchrun prints a traceback of its own
    assert "Traceback" not in said and "share=True" not in said, said[-3000:]


SEEN_ERROR = (  # gradio keeps the word in a transparent element, too
    "[...document.querySelectorAll('*')].some(e => !e.children.length && e.textContent.includes('Error') && "
    "e.checkVisibility({opacityProperty: true, visibilityProperty: true}))"
)
ASK, STOP, ANSWER = "button.primary", "button.stop", "[...document.querySelectorAll('textarea')].pop().value"


def test_stop_gives_way_to_ask_however_an_answer_ends(trained: Path, clean_environment, tmp_path: Path) -> None:
    """In a browser: after an empty question, after an answer, and after Stop, which ends the answer at once."""
    with served(trained, clean_environment, longest=60_000) as (page, client), Browser(tmp_path) as browser:
        visitor = browser.visit(client.src)
        visitor.click(ASK)
        visitor.wait(f"document.body.innerText.includes('The question is empty.') && {SEEN_ERROR}")
        visitor.wait(usable(ASK))
        assert not visitor.shown(STOP)
        words = visitor.text()
        assert "Prompt layout" in words and "System prompt" not in words and "epoch" in words
        assert visitor.js("document.querySelector('textarea').rows") > 1
        visitor.type("textarea", QUESTION)
        visitor.press("Enter")
        visitor.type("textarea", f"{visitor.js('document.querySelector(`textarea`).value')}Two rows.")
        visitor.press("Enter", shift=True)
        visitor.wait(f"{usable(ASK)} && {ANSWER}")
        assert not visitor.shown(STOP)
        visitor.type("input[type=number]", "50000")
        visitor.type("input[aria-label*=Temperature]", "0")
        visitor.press("Tab")
        before = visitor.js(ANSWER)
        visitor.click(ASK)
        visitor.wait(f"{ANSWER} && {ANSWER} !== {json.dumps(before)}")
        visitor.js(f"document.querySelector('{STOP}').click()")  # in one go: a busy page lets an answer end in between
        visitor.wait(usable(ASK), 120)
        cut = visitor.js(ANSWER)
        visitor.wait(f"!({SEEN_ERROR})")  # of the empty question, where it was long told
        assert not visitor.complaints()
        visitor.picture(tmp_path / "page.png")
    said = page.stdout.read()
    assert "Traceback" not in said and "share=True" not in said, said[-3000:]
    assert cut


def test_memory_of_the_page_does_not_grow(trained: Path, clean_environment) -> None:
    """Questions of many lengths, greedy and sampled, some refused: the last 180 of 200 add less than 3 %."""
    with served(trained, clean_environment) as (page, client):
        resident = []
        for number in range(200):
            words = "" if number % 50 == 9 else QUESTION * (1 + number % 7)
            with suppress(AppError):
                client.predict(words, "", "alpaca", 1 + number % 5, number % 2, 0.9, api_name="/ask")
            resident.append(int(Path(f"/proc/{page.pid}/statm").read_text().split()[1]))
    assert resident[-1] <= 1.03 * resident[19], [f"{pages / 256:.1f} MiB" for pages in resident[19::40]]


def test_a_question_through_the_checkpoints_own_template(tiny_base: Path, with_template: Path, python) -> None:
    model = MetaModel.from_pretrained(tiny_base, tokenizer_path=with_template, max_seq_len=300)
    messages = [{"role": "user", "content": QUESTION}]
    expected = model.generate([messages], max_gen_len=12)[0]
    assert expected != model.generate([QUESTION], max_gen_len=12)[0]
    done = python(DEMO, "--pretrained_path", tiny_base, "--tokenizer_path", with_template, *GREEDY)
    assert done.returncode == 0, done.stderr
    assert answer_in(done.stdout) == printable(expected)


def test_messages_end_where_the_template_ends_an_answer(tiny_base: Path, with_template: Path, monkeypatch) -> None:
    stops = []
    monkeypatch.setattr(answers, "generate_tokens", lambda *_, stop_ids, **__: stops.append(set(stop_ids)) or iter(()))
    model = MetaModel.from_pretrained(tiny_base, tokenizer_path=with_template, max_seq_len=30)
    messages = [{"role": "user", "content": QUESTION}]
    ids = model.chat.ids(messages)
    assert model.prompt_tokens(messages) == ids[-29:] and ids[0] == model.tokenizer.bos_id
    model.generate([QUESTION])
    model.generate([messages])
    assert stops == [{model.tokenizer.eos_id}, {model.tokenizer.eos_id, model.tokenizer.bos_id}]


def test_without_a_template_chat_is_refused(tiny_base: Path, python) -> None:
    done = python(DEMO, "--pretrained_path", tiny_base, "--system_prompt", "chat", *GREEDY)
    assert done.returncode != 0
    assert "tokenizer.json: the checkpoint has no chat template" in done.stderr


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])  # one whose port is taken, and nobody's address
def test_page_that_cannot_be_served(host: str, trained: Path, python) -> None:
    """The error comes before the model is loaded."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = ("--host", host, "--port", taken.getsockname()[1], "--password", "x")
        done = python(DEMO, "--pretrained_path", trained, "--device", "cpu", *place)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"ConfigError: --host {host} --port {place[3]}: a page cannot be served there (" in done.stderr


def test_page_for_others_needs_a_password(trained: Path, python) -> None:
    done = python(DEMO, "--pretrained_path", trained, "--host", "0.0.0.0")
    assert done.returncode != 0
    assert "--password" in done.stderr
