"""Prompts of `MetaModel.generate`: what one is, and what ends an answer to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from accessory.data.templates import DIALOG_END, DialogPrompt
from accessory.errors import ConfigError

Prompt = str | Sequence[Mapping[str, str]] | DialogPrompt
"""A text, messages with `role` and `content` for the checkpoint's chat template, or what `MetaModel.question` gives."""


def end_marks(dialog: bool, stop: tuple[str, ...]) -> tuple[str, ...]:
    """The texts that end an answer: those of `stop`, and in the dialog layout the end of a turn."""
    return (*stop, DIALOG_END) if dialog else stop


def is_prompt(given: object) -> bool:
    """Whether it is one prompt, rather than a list of them."""
    if isinstance(given, str | DialogPrompt):
        return True
    return isinstance(given, list | tuple) and len(given) > 0 and all(isinstance(part, Mapping) for part in given)


def check_text(prompt: Prompt) -> None:
    """Raise `ConfigError` for a prompt that no vocabulary can spell."""
    if isinstance(prompt, str | DialogPrompt):
        texts = (prompt,) if isinstance(prompt, str) else prompt.pieces
    else:
        texts = [message["content"] for message in prompt if isinstance(message.get("content"), str)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            "A prompt holds half of a surrogate pair, which is no text: of bytes, say, that are not UTF-8."
        ) from error


def check_prompts(prompts: object) -> None:
    """Raise `ConfigError` for what is no list of prompts."""
    if not isinstance(prompts, list | tuple):
        raise ConfigError(f"generate() was given {prompts!r}; expected a prompt, or a list of them.")
    for place, prompt in enumerate(prompts):
        if not is_prompt(prompt):
            raise ConfigError(
                f"prompt {place} is {prompt!r}; expected a text, a list of messages with role and content, or what "
                "question() gives."
            )
