"""The page of a conversation: in a browser, on two ranks, and what it keeps of its visitors."""

from __future__ import annotations

import re
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from gradio import Blocks
from gradio_client import Client
from gradio_client.exceptions import AppError

from accessory.config import ChatPageConfig
from accessory.conversation import Conversation
from accessory.errors import ConfigError
from accessory.meta import MetaModel
from accessory.parallel import groups
from demos import visits
from demos.chat_page import ChatPage, without_html
from demos.talks import MOST_TURNS, Talks
from tests.browser import Browser, Visitor, usable
from tests.demos.pages import served
from tests.here import run_here

DEMO = Path(__file__).resolve().parent.parent.parent / "demos" / "multi_turn.py"
QUESTIONS = ("What is QST?", "And the side network?", "Why?", "Thanks. How fast is it?", "Bye")
GREEDY = ("--temperature", 0, "--max_gen_len", 12, "--max_seq_len", 2000, "--dtype", "fp32")
HOW = {"temperature": 0, "max_gen_len": 12}


@pytest.fixture(scope="module")
def model(tiny_base: Path, with_template: Path) -> MetaModel:
    """That of the pages, in this process."""
    groups.start("cpu")
    return MetaModel.from_pretrained(tiny_base, tokenizer_path=with_template, max_seq_len=2000, dtype="fp32")


@pytest.fixture(scope="module")
def answers(model: MetaModel) -> list[str]:
    """Those to `QUESTIONS`, in one conversation."""
    conversation = Conversation(model)
    return [[*conversation.ask(question, **HOW)][-1] for question in QUESTIONS]


def letters(words: str) -> str:
    """What no rendering of Markdown changes."""
    return re.sub(r"[^a-zA-Z0-9]", "", words)


def said(visitor: Visitor) -> list[str]:
    """The `letters` of the messages that are shown."""
    shown = visitor.js("[...document.querySelectorAll('#said .message-content')].map(message => message.innerText)")
    return [letters(words) for words in shown]


def ask(visitor: Visitor, question: str, place: int) -> None:
    """Ask with Enter; the answer becomes message number `place`, and the box is free again."""
    visitor.type("#question textarea", question)
    visitor.press("Enter")
    visitor.wait(f"document.querySelectorAll('#said .message-content').length == {place}")
    settle(visitor)


def settle(visitor: Visitor) -> None:
    """Wait until no answer is being given."""
    visitor.wait(usable("#ask"))
    visitor.wait("document.activeElement === document.querySelector('#question textarea')")


def test_a_conversation_in_a_browser(
    tiny_base: Path, with_template: Path, answers: list[str], clean_environment, tmp_path: Path
) -> None:
    """Five turns, stop, retry, undo, clear; buttons are what they should be, and another visitor is told nothing."""
    base = ("--pretrained_path", tiny_base, "--tokenizer_path", with_template)
    expected = [letters(words) for turn in zip(QUESTIONS, answers, strict=True) for words in turn]
    flags = (*base, *GREEDY, "--max_seq_len", 60_000)
    with served(DEMO, clean_environment, *flags) as (page, client), Browser(tmp_path) as browser:
        visitor = browser.visit(client.src)
        settle(visitor)  # a page that has just come still shifts its buttons
        assert tiny_base.name in visitor.text() and "Prompt layout chat" in visitor.text()
        visitor.click("#ask")
        visitor.wait("document.body.innerText.includes('The question is empty.')")
        visitor.wait(usable("#ask"))
        assert not any(map(visitor.shown, ("#stop", "#retry", "#undo", "#clear"))) and not said(visitor)
        for number, question in enumerate(QUESTIONS):
            ask(visitor, question, 2 * number + 2)
        assert said(visitor) == expected
        assert all(map(visitor.shown, ("#retry", "#undo", "#clear"))) and not visitor.shown("#stop")
        visitor.wait("document.body.innerText.includes('The answer was cut')")
        visitor.picture(tmp_path / "five turns.png")

        other = browser.visit(client.src)
        ask(other, QUESTIONS[1], 2)
        assert said(other)[0] == letters(QUESTIONS[1]) and said(other)[1] != expected[3]

        visitor.type("input[type=number]", "50000")
        visitor.press("Tab")
        visitor.type("#question textarea", "<i>Go</i> on ![](/x)")
        visitor.press("Enter")
        visitor.wait(f"document.querySelectorAll('#said .message-content').length == 12 && {usable('#stop')}")
        others = [usable(place) for place in ("#ask", "#retry", "#undo", "#clear", "#question textarea")]
        # In one go: the page is busy with showing the answer, and would let it end between two commands.
        assert not any(visitor.js(f"[{', '.join(others)}, document.querySelector('#stop').click()]"))
        visitor.wait("document.body.innerText.includes('Stopped.')", 120)
        settle(visitor)
        stopped = said(visitor)
        assert stopped[:10] == expected and stopped[10] == letters("<i>Go</i> on ![](/x)") and stopped[11]
        visitor.click("#undo")
        visitor.wait("document.querySelector('#question textarea').value == '<i>Go</i> on ![](/x)'")
        assert said(visitor) == expected
        visitor.type("input[type=number]", "12")
        visitor.press("Tab")
        visitor.click("#retry")
        visitor.wait(usable("#stop") + "|| true")
        settle(visitor)
        assert said(visitor) == expected
        visitor.click("#clear")
        visitor.wait("!document.querySelector('#said .message-content')")
        visitor.wait("document.querySelector('#retry').disabled")
        ask(visitor, QUESTIONS[0], 2)
        assert said(visitor) == expected[:2] and len(said(other)) == 2
        assert not visitor.complaints() and not other.complaints()
    assert "Traceback" not in (words := page.stdout.read()), words[-3000:]


def test_two_visitors_on_two_ranks(tiny_base: Path, with_template: Path, answers: list[str], clean_environment) -> None:
    """Each is answered with what was said to it; an answer that is stopped ends on both ranks."""
    base = ("--pretrained_path", tiny_base, "--tokenizer_path", with_template, "--kept_caches", 1)
    base += ("--max_seq_len", 60_000)
    settings = ("", 12, 0, 1, 0, 1, 0)  # system, max_gen_len, temperature, top_p, top_k, repetition_penalty, seed
    with served(DEMO, clean_environment, *base, *GREEDY, ranks=2) as (page, first):
        second = Client(first.src, verbose=False)
        for number, question in enumerate(QUESTIONS[:2]):
            for client in (first, second):
                shown, _ = client.predict(question, *settings, api_name="/ask")
                assert [letters(text_of(message)) for message in shown[1::2]] == list(
                    map(letters, answers[: number + 1])
                )
        job = first.submit("Go on", "", 50_000, 0, 1, 0, 1, 0, api_name="/ask")
        while not job.outputs():
            time.sleep(0.02)
        job.cancel()
        begun = time.monotonic()
        with pytest.raises(AppError, match="'temperature' is -1"):
            second.predict("x", "", 12, -1, 1, 0, 1, 0, api_name="/ask")
        shown, _ = second.predict(QUESTIONS[2], *settings, api_name="/ask")
        assert letters(text_of(shown[-1])) == letters(answers[2]) and time.monotonic() - begun < 60
        assert "img-src 'self'" in httpx.get(first.src).headers["content-security-policy"]
        assert httpx.get(first.src, headers={"Origin": "http://evil.example"}).status_code == 403
        assert httpx.post(f"{first.src}gradio_api/upload", files={"files": b"x"}).status_code == 403
        shown, question = second.predict(api_name="/undo")
        assert question == QUESTIONS[2] and len(shown) == 4
    said = page.stdout.read().partition("Received 15 death signal")[0]  # torchrun prints a traceback of its own
    assert "Traceback" not in said, said[-3000:]


def test_a_tab_that_is_closed_in_the_middle_of_an_answer(
    tiny_base: Path, with_template: Path, answers: list[str], clean_environment, tmp_path: Path
) -> None:
    """On two ranks, it frees the other tab, which has a conversation of its own; both may ask at the same time."""
    base = ("--pretrained_path", tiny_base, "--tokenizer_path", with_template, "--max_seq_len", 60_000)
    with (
        served(DEMO, clean_environment, *base, *GREEDY[:4], "--dtype", "fp32", ranks=2) as (page, client),
        Browser(tmp_path) as browser,
    ):
        one = browser.visit(client.src)
        two = browser.visit(client.src, beside=one)
        for tab, question in ((one, QUESTIONS[0]), (two, QUESTIONS[0])):
            tab.type("#question textarea", question)
            tab.press("Enter")
        for tab in (one, two):
            tab.wait("document.querySelectorAll('#said .message-content').length == 2")
            settle(tab)
            assert said(tab) == [letters(QUESTIONS[0]), letters(answers[0])]
        one.type("input[type=number]", "50000")
        one.press("Tab")
        one.type("#question textarea", "<i>Go</i> on ![](/x)")
        one.press("Enter")
        one.wait("document.querySelectorAll('#said .message-content')[3]?.innerText.length > 20")
        one.close()
        begun = time.monotonic()
        ask(two, QUESTIONS[1], 4)
        assert said(two)[3] == letters(answers[1]) and time.monotonic() - begun < 120
        assert not two.complaints()
    words = page.stdout.read().partition("Received 15 death signal")[0]  # torchrun prints a traceback of its own
    assert "Traceback" not in words, words[-3000:]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:gradio")
def test_a_page_of_a_short_model(
    tiny_base: Path, with_template: Path, model: MetaModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Words of the system, a history that is cut, questions that are too long or hold control characters."""
    short = MetaModel.from_pretrained(tiny_base, tokenizer_path=with_template, max_seq_len=150, dtype="fp32")
    talk = Conversation(short, "Be brief.")
    odd = "a\x00b\x1b[2Jc\u202ed"
    asked = [*QUESTIONS, odd]
    expected = [letters(words) for each in asked for words in (each, [*talk.ask(each, **HOW)][-1])]
    left_out = talk.note.removesuffix(".")
    assert talk.history[-1].first > 0

    def visit(page: Blocks) -> None:
        with Browser(tmp_path) as browser:
            visitor = browser.visit(page.local_url, 420, 900)
            visitor.wait(usable("#ask"))
            visitor.type("label textarea[placeholder*='Words before']", "Be brief.")
            for number, question in enumerate(asked):
                ask(visitor, question, 2 * number + 2)
            assert said(visitor) == expected
            assert left_out in visitor.text()
            visitor.picture(tmp_path / "narrow.png")
            visitor.resize(1200, 900)
            visitor.darken()
            visitor.type("#question textarea", "long " * 2000)
            visitor.press("Enter")
            visitor.wait("document.body.innerText.includes('tokens; expected less than 150')")
            settle(visitor)
            visitor.picture(tmp_path / "refused.png")
            assert said(visitor) == expected
            assert visitor.js("document.querySelector('#question textarea').value") == "long " * 2000
            assert not visitor.complaints()
        page.close()

    monkeypatch.setattr(Blocks, "block_thread", visit)
    base = ("--pretrained_path", tiny_base, "--tokenizer_path", with_template, "--max_seq_len", 150, "--device", "cpu")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_here("demos/multi_turn.py", *base, *GREEDY[:4], "--dtype", "fp32", "--port", port) == 0


def text_of(message: dict) -> str:
    """The words of a message as gradio's client gives it."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def test_markup_is_shown_as_it_is_written() -> None:
    """Tags, entities and images, not those in code, which Markdown shows as they are."""
    for words, expected in (
        ("a <b>c</b> & d < e", "a &lt;b>c&lt;/b> & d < e"),
        ("&lt; &#60; ![x](http://x)", "&amp;lt; &amp;#60; !\\[x](http://x)"),
        ("`<b>` <i>", "`<b>` &lt;i>"),
        ("```html\n<b>\n```\n<b>", "```html\n<b>\n```\n&lt;b>"),
        ("```html\n<b>", "```html\n<b>"),
    ):
        assert without_html(words) == expected


def test_settings_begin_as_the_flags_and_the_training_say(model: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "system", "Be kind.")
    config = ChatPageConfig(pretrained_path=["x"], top_k=7, seed=3)
    parts = ChatPage(Talks(model, config), config, model).blocks.config["components"]
    values = {part["props"].get("label"): part["props"].get("value") for part in parts}
    assert (values["System"], values["Top-k (0: all)"], values["Seed"]) == ("Be kind.", 7, 3)


def test_what_visitors_hold_is_bounded(model: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations by number, keys and values by --kept_caches; one that was forgotten begins anew."""
    monkeypatch.setattr(visits, "MOST_VISITS", 3)
    talks = Talks(model, ChatPageConfig(pretrained_path=["x"], kept_caches=2))
    for name in "abca":
        list(talks.ask(name, QUESTIONS[0], None, HOW))
    kept = {name: len(talks.of(name).history) for name in "abc"}
    assert kept == {"a": 2, "b": 1, "c": 1}
    assert [bool(talks.of(name)._kept.layers) for name in "abc"] == [True, False, True]
    assert not talks.of("d").history and not talks.of("a").history
    assert len(talks.of("c").history) == 1
    talks.leave("c")
    assert not talks.of("c").history


def test_what_comes_over_the_network_is_checked(model: MetaModel) -> None:
    talks = Talks(model, ChatPageConfig(pretrained_path=["x"]))
    for question, system, said in (
        (None, None, "The question is no text of at most 20,000 characters"),
        ("x" * 30_000, None, "The question is no text"),
        ("\ud800", None, "half of a surrogate pair"),
        ("hi", ["x"], "The system's words is no text"),
        ("hi", "x" * 30_000, "The system's words is no text"),
    ):
        with pytest.raises(ConfigError, match=said):
            next(talks.ask("a", question, system, HOW))
    talks.of("a").history = [None] * MOST_TURNS
    with pytest.raises(ConfigError, match="A conversation has at most 200 turns"):
        next(talks.ask("a", "hi", None, HOW))


def test_one_answer_at_a_time(model: MetaModel) -> None:
    """A second visitor waits for the first, whose leaving frees the place; undo waits for the end of the answer."""
    talks = Talks(model, ChatPageConfig(pretrained_path=["x"]))
    first = talks.ask("a", QUESTIONS[0], None, HOW)
    next(first)
    second: list[Conversation] = []
    asking = threading.Thread(target=lambda: second.extend(talks.ask("b", QUESTIONS[0], "Be brief.", HOW)))
    asking.start()
    asking.join(timeout=0.2)
    assert not second and not talks.empty.history
    first.close()
    asking.join(timeout=120)
    assert talks.of("b").system == "Be brief." and talks.of("a").system is None
    assert talks.of("a").history[0].ended == "stopped" and talks.of("b").history[0].answer


def test_closing_ends_an_answer(model: MetaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its next token; of one that nobody takes tokens of, it says that other ranks are in the middle of it."""
    monkeypatch.setattr("demos.talks._PATIENCE", 120)
    talks, config = Talks(model, ChatPageConfig(pretrained_path=["x"])), {"temperature": 0, "max_gen_len": 1500}
    asking = threading.Thread(target=lambda: list(talks.ask("a", "<i>Go</i> on", None, config)))
    asking.start()
    while not talks._visits.of("a").history:
        time.sleep(0.01)
    assert talks.close() and talks.of("a").history[0].ended == "stopped"
    monkeypatch.setattr("demos.talks._PATIENCE", 0)
    assert not talks.close()
