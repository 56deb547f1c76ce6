"""A single question, perhaps about an image: asked of a model on every rank, in the terminal or from a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch.distributed as dist

from accessory.config import DemoConfig, ImageDemoConfig
from accessory.data.pictures import Picture
from accessory.errors import ConfigError
from accessory.meta import MetaModel, Sampling
from demos.loading import sampling_of
from demos.terminal import printable


@dataclass(frozen=True)
class Question:
    """One question and how to answer it, as every rank gets it."""

    question: str
    input: str
    system_prompt: str
    how: Sampling
    picture: Picture | None = None


def answer(model: MetaModel, question: Question, stopped: Callable[[], bool] | None = None) -> Iterator[str]:
    """The answer so far, growing. Every rank must go through it together; `stopped` ends it, from the main one.

    Raises `ConfigError` for a question that is too long or no text.
    """
    prompt = model.question(question.question, question.input, question.system_prompt)
    ids = model.whole_prompt_tokens(prompt, question.picture)
    if len(ids) >= model.max_seq_len:
        raise ConfigError(
            f"The question has {len(ids)} tokens; expected less than {model.max_seq_len} (--max_seq_len)."
        )
    ended = (lambda: {0} if stopped() else ()) if stopped else None
    pictures = [question.picture]
    steps = model.steps([ids], model.stop_ids([prompt]), question.how, stopped=ended, pictures=pictures)
    return model.texts(prompt, steps, question.how.stop)


def check_words(question: object, system_prompt: str) -> None:
    """Raise `ConfigError` for a question without words; the layout caption shows none."""
    if not isinstance(question, str) or not (question.strip() or system_prompt == "caption"):
        raise ConfigError("The question is empty.")


def answer_in_terminal(model: MetaModel, config: DemoConfig, speaks: bool) -> None:
    """Stream the answers to all --prompt questions."""
    picture = model.picture(config.image, config.image_transform) if isinstance(config, ImageDemoConfig) else None
    for prompt in config.prompt:
        question = Question(prompt, "", config.system_prompt, sampling_of(config), picture)
        shown = ""
        if speaks:
            print(f"Q: {printable(prompt)}\nA: ", end="", flush=True)
        for text in answer(model, question):
            if speaks:
                print(printable(text[len(shown) :]), end="", flush=True)
            shown = text
        if speaks:
            print("\n", flush=True)


def follow(model: MetaModel) -> None:
    """Answer along with the main rank until it sends no question."""
    while True:
        message: list[Question | None] = [None]
        dist.broadcast_object_list(message, src=0)
        if message[0] is None:
            return
        with suppress(ConfigError):  # the main rank raises the same and reports it
            for _ in answer(model, message[0]):
                pass
