"""The page of a conversation: what was said, the question's box, buttons, and settings beside them."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import Any

import gradio
from gradio.components import Component

from accessory.config import ChatPageConfig, ImagePageConfig
from accessory.conversation import Conversation
from accessory.data.templates import CHAT
from accessory.meta import MetaModel
from demos.image_box import UNLISTED, ImageBox
from demos.page_serving import MAX_QUESTION, model_name
from demos.sent_images import sendable
from demos.talks import Talks
from demos.telling import told

SLIDERS = (
    ("max_gen_len", "Max tokens", 1, None, 1),
    ("temperature", "Temperature", 0, 2, 0.01),
    ("top_p", "Top-p", 0.01, 1, 0.01),
    ("top_k", "Top-k (0: all)", 0, 200, 1),
    ("repetition_penalty", "Repetition penalty", 1, 2, 0.01),
)
"""Flag, label, lowest, highest (None: the model's length) and step."""
ENDINGS = {"length": "The answer was cut: it has reached Max tokens, or the model's length.", "stopped": "Stopped."}
LOOKS = "#said .message { overflow-wrap: anywhere } :root:has(.dark) { color-scheme: dark } #note { overflow: hidden }"
FOCUS = "() => document.querySelector('#question textarea').focus()"
_CODE = re.compile(r"(```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`)", re.DOTALL)
_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)|(?<=!)\[")
_ESCAPED = {"<": "&lt;", "&": "&amp;", "[": "\\["}


class ChatPage:
    """The page's parts, and what its buttons do with them."""

    def __init__(self, talks: Talks, config: ChatPageConfig, model: MetaModel) -> None:
        self._talks = talks
        with gradio.Blocks(title="Accessory", analytics_enabled=False) as self.blocks:
            gradio.Markdown(_head(talks.empty, config, model))
            self._box: ImageBox | None = None
            with gradio.Row():
                if isinstance(config, ImagePageConfig):
                    with gradio.Column(scale=1, min_width=260):
                        self._box = ImageBox(config)
                with gradio.Column(scale=3, min_width=320):
                    self._lay_out_talk()
                with gradio.Column(scale=1, min_width=260):
                    self._lay_out_settings(config, model)
            self._wire()

    def _lay_out_talk(self) -> None:
        self._said = gradio.Chatbot(
            show_label=False, height="60vh", buttons=["copy", "copy_all"], feedback_options=None, latex_delimiters=[],
            elem_id="said", placeholder="Nothing has been asked yet.",
        )  # fmt: skip
        self._note = gradio.Markdown(visible=False, elem_id="note")
        self._question = gradio.Textbox(
            label="Question", show_label=False, lines=1, max_lines=10, max_length=MAX_QUESTION, autofocus=True,
            elem_id="question", placeholder="Enter asks, Shift+Enter begins a line",
        )  # fmt: skip
        with gradio.Row():
            self._ask = gradio.Button("Ask", variant="primary", min_width=80, elem_id="ask")
            self._stop = gradio.Button("Stop", variant="stop", visible=False, min_width=80, elem_id="stop")
            self._retry, self._undo, self._clear = (
                gradio.Button(name, interactive=False, min_width=80, elem_id=name.lower())
                for name in ("Retry", "Undo", "Clear")
            )

    def _lay_out_settings(self, config: ChatPageConfig, model: MetaModel) -> None:
        self._system = gradio.Textbox(
            label="System", lines=3, max_lines=8, value=self._talks.empty.system, max_length=MAX_QUESTION,
            placeholder="Words before the first turn; without any, those of the layout",
            visible=self._talks.empty.remembers,
        )  # fmt: skip
        self._sampling: dict[str, Component] = {
            name: gradio.Slider(low, high or model.max_seq_len, getattr(config, name), step=step, label=label)
            for name, label, low, high, step in SLIDERS
        }
        self._sampling["seed"] = gradio.Number(config.seed, label="Seed", precision=0)

    def _wire(self) -> None:
        """Let an answer change the buttons before and after it, however it ends."""
        settings = [self._system, *self._sampling.values()]
        settings += [self._box.image, self._box.transform] if self._box else []
        changing = [self._note, self._question, self._ask, self._stop, self._retry, self._undo, self._clear]
        settled = {"outputs": [self._said, *changing], **UNLISTED}
        answers = []
        for triggers, answer, inputs, name in (
            ([self._ask.click, self._question.submit], self._answer_question, [self._question, *settings], "ask"),
            ([self._retry.click], self._answer_again, settings, "retry"),
        ):
            begun = gradio.on(triggers, _while_answering, outputs=changing, **UNLISTED)
            # Unprocessed, so that `Talks` alone says what is wrong with a value; without gradio's progress, which would
            # cover what was said when a question is refused.
            answering = begun.then(
                answer, inputs, [self._said, self._question], api_name=name, preprocess=False, show_progress="hidden"
            )
            for ended in (answering.success, answering.failure):
                ended(self._settled, **settled).then(None, js=FOCUS, **UNLISTED)
            answers.append(answering)
        self._stop.click(self._stopped, cancels=answers, **UNLISTED).then(self._settled, **settled)
        undone = self._undo.click(self._take_back, outputs=[self._said, self._question], queue=False, api_name="undo")
        clear = {"fn": self._forget, "outputs": self._said, "queue": False}
        cleared = self._clear.click(**clear, api_name="clear")
        self._said.clear(**clear, api_visibility="undocumented").then(self._settled, **settled)  # its own small button
        for done in (undone, cleared):
            done.then(self._settled, **settled)
        if self._box:
            self._box.on_look(self._look, self._seen).success(self._settled, **settled)
        self.blocks.unload(self._left)

    def _answer_question(self, request: gradio.Request, question: object, system: object, *rest: object) -> Iterator:
        how, image = self._how(rest)
        yield from _shown(self._talks.ask(request.session_hash, question, system, how, *image))

    def _answer_again(self, request: gradio.Request, system: object, *rest: object) -> Iterator:
        how, _ = self._how(rest)
        yield from _shown(self._talks.retry(request.session_hash, system, how))

    def _how(self, rest: tuple[object, ...]) -> tuple[dict[str, object], tuple[object, ...]]:
        """(sampling by name, what the image's box holds, if there is one) of the last inputs."""
        count = len(self._sampling)
        return dict(zip(self._sampling, rest[:count], strict=True)), rest[count:]

    def _look(self, request: gradio.Request, image: object, transform: object) -> str:
        with told():
            return sendable(self._talks.look(request.session_hash, image, transform).picture)

    def _seen(self, request: gradio.Request) -> str:
        return sendable(self._talks.of(request.session_hash, wait=False).picture)

    def _stopped(self, request: gradio.Request) -> None:
        self._talks.stop(request.session_hash)

    def _take_back(self, request: gradio.Request) -> tuple[list[dict], str]:
        conversation = self._talks.of(request.session_hash)
        with told():
            question = conversation.undo()
        return _messages(conversation), question

    def _forget(self, request: gradio.Request) -> list[dict]:
        self._talks.of(request.session_hash).clear()
        return []

    def _settled(self, request: gradio.Request) -> tuple:
        """What is shown while no answer is being given."""
        conversation = self._talks.of(request.session_hash)
        note, some = _note(conversation), bool(conversation.history)
        return (
            _messages(conversation),
            gradio.Markdown(note, visible=bool(note)),
            gradio.Textbox(interactive=True),
            gradio.Button(visible=True),
            gradio.Button(visible=False),
            *[gradio.Button(interactive=some)] * 3,
        )

    def _left(self, request: gradio.Request) -> None:
        self._talks.leave(request.session_hash)


def _while_answering() -> tuple:
    return (
        gradio.Markdown("Answering …", visible=True),
        gradio.Textbox(interactive=False),  # a second question would begin beneath the first one's buttons
        gradio.Button(visible=False),
        gradio.Button(visible=True),
        *[gradio.Button(interactive=False)] * 3,
    )


def _shown(answering: Generator[Conversation, None, None]) -> Iterator[tuple[list[dict], Any]]:
    """What was said, and the question's box, which is emptied when the answer begins: one that is refused stays."""
    with told(), closing(answering):
        for conversation in answering:
            yield _messages(conversation), ""


def _messages(conversation: Conversation) -> list[dict[str, str]]:
    said = []
    for turn in conversation.history:
        said += [("user", turn.question), ("assistant", turn.answer)]
    return [{"role": role, "content": without_html(words)} for role, words in said]


def without_html(words: str) -> str:
    """Markdown that shows tags, entities and images as they are written; code has none, and is left alone."""
    parts = _CODE.split(words)
    parts[::2] = [_MARKUP.sub(lambda found: _ESCAPED[found[0]], part) for part in parts[::2]]
    return "".join(parts)


def _note(conversation: Conversation) -> str:
    last = conversation.history[-1].ended if conversation.history else ""
    return " ".join(part for part in (conversation.note, ENDINGS.get(last, "")) if part)


def _head(empty: Conversation, config: ChatPageConfig, model: MetaModel) -> str:
    """The model's name and how questions are laid out, as Markdown."""
    about = "the checkpoint's own" if empty.prompt_layout == CHAT else "of conversations"
    if not empty.remembers:
        about = "of single questions: each is asked without what was said before"
    name = model_name(config.pretrained_path).replace("`", "'")
    head = f"### `{name}`\nPrompt layout `{empty.prompt_layout}`, {about}. Up to {model.max_seq_len:,} tokens."
    return head + " Another image begins a new conversation." * isinstance(config, ImagePageConfig)
