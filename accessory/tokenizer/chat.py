"""Conversations as a checkpoint's own chat template lays them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from accessory.errors import TokenizerError
from accessory.tokenizer.sandbox import ChatTemplate

if TYPE_CHECKING:
    from accessory.tokenizer.base import Tokenizer
    from accessory.tokenizer.special import Added

ROLES = ("system", "user", "assistant")
# Noncharacters of Unicode: no text has a use for them, so that they can stand for what must pass the template unread.
_BEGIN, _END, _PROBE = "\ufdd0", "\ufdd1", "\ufdd2"
_STANDING_IN = re.compile(f"{_BEGIN}([0-9]+){_END}")
_HINT = "Train with another prompt_type."


def default_template(config: Mapping[str, object], source: str) -> str | None:
    """The chat template of a tokenizer_config.json, the one named `default` where it lists several; None without any.

    Raises TokenizerError for a value of another shape.
    """
    stated = config.get("chat_template")
    if isinstance(stated, list):
        named = {item.get("name"): item.get("template") for item in stated if isinstance(item, dict)}
        stated = named.get("default", stated)
    if stated is not None and not isinstance(stated, str):
        raise TokenizerError(f"{source}: 'chat_template' is {stated!r}; expected a text, or a list with a 'default'.")
    return stated


class Chat:
    """A tokenizer's chat template, rendering messages to ids.

    Control tokens that the template writes become their ids. Spelled inside a message they stay plain text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises TokenizerError for a tokenizer without template, or with one that is no Jinja."""
        if tokenizer.chat_template is None:
            raise TokenizerError(
                f"{tokenizer.source}: the checkpoint has no chat template; expected 'chat_template' in "
                "tokenizer_config.json, a chat_template.jinja, or tokenizer.chat_template in a GGUF file."
            )
        self._tokenizer, self._source = tokenizer, tokenizer.source
        self._template = ChatTemplate(tokenizer.chat_template, tokenizer.source)
        # Longest first, as a longer token may begin like a shorter one.
        self._controls = sorted(tokenizer.control_tokens().items(), key=lambda item: -len(item[1].content))
        spelled = [re.escape(token.content) for _, token in self._controls]
        self._spelled = re.compile("|".join([*spelled, f"[{_BEGIN}{_END}{_PROBE}]"]))
        parts = (
            r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip for _, token in self._controls
        )
        names = [token.content for _, token in self._controls]
        self._beginnings = {name[:cut] for name in names for cut in range(1, len(name))}
        self._endings = {name[cut:] for name in names for cut in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        self._written = re.compile("|".join(f"({part})" for part in parts) or r"(?!)")

    def ids(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation, nothing added before or behind: the template writes BOS where it belongs.

        Each message has a `role` (system, user, assistant) and a `content`. Raises TokenizerError for other messages,
        and for those that the template refuses.
        """
        hidden: list[str] = []
        return self._encode(self._render(self._hide(messages, hidden), add_generation_prompt), hidden, at_start=True)

    def learnable(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[list[int], bool]]:
        """A conversation in stretches of ids, each with whether it is the assistant's: its words, and their end.

        Raises TokenizerError where the template lays out a beginning otherwise than as the beginning of the whole,
        since what is trained would then not be what is asked.
        """
        hidden: list[str] = []
        plain = self._hide(messages, hidden)
        stretches: list[tuple[str, bool]] = []
        done, end = "", self._after_answer
        for place, message in enumerate(plain):
            if message["role"] != "assistant":
                continue
            asked = self._render(plain[:place], True)
            answered = self._render(plain[: place + 1], False)
            self._check_grows(done, asked)
            self._check_grows(asked, answered)
            if not answered.endswith(end.rest) or len(answered) - len(end.rest) < len(asked):
                raise TokenizerError(f"{self._source}: its chat template does not end all answers alike. {_HINT}")
            cut = len(answered) - len(end.rest) + len(end.closing)
            stretches += [(asked[len(done) :], False), (answered[len(asked) : cut], True)]
            done = answered[:cut]
        encoded = []
        for number, (text, learned) in enumerate(stretches):
            encoded.append((self._encode(text, hidden, at_start=number == 0), learned))
        if encoded and not end.closing:
            encoded[-1][0].append(self._tokenizer.eos_id)
        return encoded

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's, and the control token with which the template ends one."""
        found = self._after_answer.control
        return self._tokenizer.stop_ids | (frozenset() if found is None else {found})

    @cached_property
    def _after_answer(self) -> _Ending:
        """What the template puts behind an assistant's words, found out with words that occur nowhere else."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        rest = self._behind_probe(messages)
        found = self._written.search(rest)
        if found:
            return _Ending(rest, rest[: found.end()], self._id(found))
        # ChatGLM3 has nothing there: a turn ends where the next begins.
        found = self._written.search(self._behind_probe([*messages, {"role": "user", "content": "a"}]))
        return _Ending(rest, "", self._id(found) if found else None)

    def _behind_probe(self, messages: list[dict[str, str]]) -> str:
        rendered = self._render(messages, False)
        if rendered.count(_PROBE) != 1:
            raise TokenizerError(f"{self._source}: its chat template does not write an answer as it is. {_HINT}")
        return rendered.partition(_PROBE)[2]

    def _check_grows(self, beginning: str, whole: str) -> None:
        if not whole.startswith(beginning):
            raise TokenizerError(
                f"{self._source}: its chat template lays out the beginning of a conversation otherwise once it goes "
                f"on. {_HINT}"
            )

    def _hide(self, messages: Sequence[Mapping[str, str]], hidden: list[str]) -> list[dict[str, str]]:
        """The messages with a stand-in for each control token spelled in them; what it stands for goes to `hidden`."""

        def stand_in(found: re.Match) -> str:
            hidden.append(found[0])
            return f"{_BEGIN}{len(hidden) - 1}{_END}"

        _check(messages, self._source)
        contents = [self._seal(self._spelled.sub(stand_in, m["content"]), stand_in) for m in messages]
        return [{"role": m["role"], "content": content} for m, content in zip(messages, contents, strict=True)]

    def _seal(self, content: str, stand_in: Callable[[re.Match], str]) -> str:
        """Hide the last or first letter where a part of a control token ends or begins a message.

        Two messages side by side, or a message and the template's own words, could make a whole one of it.
        """
        words, lengths = content.strip(), range(1, self._longest)
        if any(words[-length:] in self._beginnings for length in lengths):
            content = re.sub(r"\S(?=\s*\Z)", stand_in, content)
        if any(words[:length] in self._endings for length in lengths):
            content = re.sub(r"\S", stand_in, content, count=1)
        return content

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **self._tokenizer.special_names(),
        )

    def _encode(self, text: str, hidden: list[str], *, at_start: bool) -> list[int]:
        """Ids of rendered text. `at_start` False: it goes on where other text ended."""
        ids, position, place = [], 0, "start" if at_start else "continued"
        for found in [*self._written.finditer(text), None]:
            stretch = text[position : found.start() if found else len(text)]
            if stretch:
                words = _STANDING_IN.sub(lambda m: hidden[int(m[1])] if int(m[1]) < len(hidden) else "", stretch)
                ids += self._tokenizer.encode_stretch(words, place)
            if found:
                ids.append(self._id(found))
                position, place = found.end(), "behind_control"
        return ids

    def _id(self, found: re.Match) -> int:
        return self._controls[found.lastindex - 1][0]


@dataclass(frozen=True)
class _Ending:
    """What follows an answer: `rest` to the end of the text, `closing` up to its first control token, `control`."""

    rest: str
    closing: str
    control: int | None


def _pattern(token: Added) -> str:
    """A group that matches the token, and the blanks it swallows."""
    return "(" + r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip + ")"


def _check(messages: Sequence[Mapping[str, str]], source: str) -> None:
    if not isinstance(messages, Sequence) or not messages:
        raise TokenizerError(f"{source}: the messages are {messages!r}; expected a list of at least one.")
    for message in messages:
        fits = isinstance(message, Mapping) and set(message) == {"role", "content"}
        if not fits or message["role"] not in ROLES or not isinstance(message["content"], str):
            raise TokenizerError(
                f"{source}: a message is {message!r}; expected a 'role' ({', '.join(ROLES)}) and a text as 'content'."
            )
