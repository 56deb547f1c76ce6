"""Conversations as a checkpoint's own chat template lays them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from accessory.errors import TokenizerError
from accessory.tokenizer.base import Place, Tokenizer
from accessory.tokenizer.reasoning import is_whole, written_whole
from accessory.tokenizer.sandbox import ChatTemplate

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
MORE_KEYS = ("tool_calls", "tool_call_id", "name")
"""Keys that a message may have beside `role` and `content`."""
# Noncharacters of Unicode: no text uses them, so they can stand in for what a template must not see.
_BEGIN, _END, _PROBE = "\ufdd0", "\ufdd1", "\ufdd2"
_STANDING_IN = re.compile(f"{_BEGIN}([0-9]+){_END}")


class Chat:
    """A tokenizer's chat template, rendering messages to ids, the same for training and asking.

    Control tokens that the template writes become their ids. Spelled inside a message they stay plain text.
    """

    def __init__(self, tokenizer: Tokenizer, clock: datetime | None = None) -> None:
        """`clock` is the time for templates that print it; absent: the present.

        Raises TokenizerError for a tokenizer without template, or with one that is no Jinja.
        """
        if tokenizer.chat_template is None:
            raise TokenizerError(
                f"{tokenizer.source}: the checkpoint has no chat template; expected 'chat_template' in "
                "tokenizer_config.json, a chat_template.jinja, or tokenizer.chat_template in a GGUF file."
            )
        self._tokenizer, self._source = tokenizer, tokenizer.source
        self._template = ChatTemplate(tokenizer.chat_template, tokenizer.source, clock)
        self.definition = tokenizer.chat_template + (str(clock) if "strftime_now" in tokenizer.chat_template else "")
        """The template, and the clock if it prints the time: with the tokenizer, all that the layout depends on."""
        self._left_out: dict[str, bool] = {}
        # Longest first, as a longer token may begin like a shorter one.
        self._controls = sorted(tokenizer.control_tokens().items(), key=lambda item: -len(item[1].content))
        names = [token.content for _, token in self._controls]
        self._spelled = re.compile("|".join([*map(re.escape, names), f"[{_BEGIN}{_END}{_PROBE}]"]))
        self._beginnings = {name[:cut] for name in names for cut in range(1, len(name))}
        self._endings = {name[cut:] for name in names for cut in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        tokens = (token for _, token in self._controls)
        parts = (r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip for token in tokens)
        self._written = re.compile("|".join(f"({part})" for part in parts) or r"(?!)")

    def ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """The ids of a conversation. Nothing is added before or after: the template writes BOS where it belongs.

        Each message has a `role` (of `ROLES`) and a `content`, and may have what `MORE_KEYS` names. tools: functions
        that the assistant may call, as JSON schemas. Raises TokenizerError for other messages, and for those that the
        template refuses or leaves out.
        """
        hidden: list[str] = []
        plain, tools = self._hide(messages, hidden), self._hide_tools(tools, hidden)
        return self._encode(self._render(plain, add_generation_prompt, tools), hidden)[0]

    def documents(
        self,
        messages: Sequence[Mapping[str, Any]],
        learned: Sequence[bool] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[list[tuple[list[int], bool]]]:
        """The documents to learn a conversation from, each a list of segments: (ids, whether they are learned).

        Every answer is learned whole, with its end, after exactly the ids that stand before it when it is asked for.
        Answers share a document as long as the template leaves earlier turns as they were; where it changes them (drops
        their reasoning, say), a new document begins. learned: for each message, whether it is, if it is an answer;
        absent: all are. Raises TokenizerError as `ids` does, and for an answer that the template does not end.
        """
        hidden: list[str] = []
        plain, tools = self._hide(messages, hidden), self._hide_tools(tools, hidden)
        documents: list[list[tuple[list[int], bool]]] = []
        done: list[int] = []
        for place, message in enumerate(plain):
            if message["role"] != "assistant" or not (learned is None or learned[place]):
                continue
            asked, answer, end = self._turn(plain[:place], message, tools)
            prompt, behind = self._encode(asked, hidden)
            taught, _ = self._encode(answer + end, hidden, behind)
            taught += [] if end else [self._tokenizer.eos_id]
            if not documents or prompt[: len(done)] != done:
                documents.append([])
                done = []
            documents[-1] += [(prompt[len(done) :], False), (taught, True)]
            done = prompt + taught
        return documents

    @cached_property
    def takes_tools(self) -> bool:
        """Whether the template lays out the functions that the assistant may call."""
        function = {"name": _PROBE, "description": "a", "parameters": {"type": "object", "properties": {}}}
        try:
            rendered = self._render(
                [{"role": "user", "content": "a"}], True, [{"type": "function", "function": function}]
            )
        except TokenizerError:  # rendering the conversation will say so
            return True
        return _PROBE in rendered

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer: the tokenizer's, and the control token with which the template ends one."""
        found = self._after_answer.control
        return self._tokenizer.stop_ids | (frozenset() if found is None else {found})

    def _turn(self, before: list[Message], message: Message, tools: list[Message] | None) -> tuple[str, str, str]:
        """(text before an answer, the answer, text that ends it), for the answer `message` to the messages `before`."""
        asked, end, content = self._render(before, True, tools), self._after_answer, message["content"]
        whole = self._render([*before, message], False, tools)
        answer = whole.removesuffix(end.rest)[len(asked) :]
        framed_alike, calls = whole == asked + answer + end.rest, message.get("tool_calls")
        if calls:
            names = [call["function"]["name"] for call in calls]
            if framed_alike and content.strip() in answer and all(name in answer for name in names):
                return asked, answer, end.closing
            raise TokenizerError(f"{self._source}: its chat template leaves out tool_calls, or ends them otherwise.")
        if framed_alike and is_whole(asked, answer, content):
            return asked, answer, end.closing
        # The template cuts or rewrites this answer, or begins answers otherwise than its generation prompt does. The
        # words then go where it puts those of a probe.
        framed, rest = self._around_answer(before, tools=tools)
        end = self._ending(rest)
        if end.control is not None and end.control not in self.stop_ids:
            raise TokenizerError(f"{self._source}: its chat template does not end all answers alike.")
        return asked, written_whole(asked, framed, content), end.closing

    @cached_property
    def _after_answer(self) -> _Ending:
        """What the template puts after an assistant's words, found with a probe that occurs nowhere else."""
        asked = [{"role": "user", "content": "a"}]
        found = self._ending(self._around_answer(asked)[1])
        if found.control is not None:
            return found
        # ChatGLM3 has nothing there: a turn ends where the next begins.
        control = self._written.search(self._around_answer(asked, asked)[1])
        return _Ending(found.rest, "", self._id(control) if control else None)

    def _ending(self, rest: str) -> _Ending:
        found = self._written.search(rest)
        return _Ending(rest, rest[: found.end()], self._id(found)) if found else _Ending(rest, "", None)

    def _around_answer(
        self, before: list[Message], behind: Sequence[Message] = (), tools: list[Message] | None = None
    ) -> tuple[str, str]:
        """Rendered text before and after an answer that stands between the messages `before` and `behind`."""
        rendered = self._render([*before, {"role": "assistant", "content": _PROBE}, *behind], False, tools)
        if rendered.count(_PROBE) != 1:
            raise TokenizerError(
                f"{self._source}: its chat template does not write an answer as it is. Train with another prompt_type."
            )
        begin, _, rest = rendered.partition(_PROBE)
        return begin, rest

    def _check_role(self, role: str) -> None:
        """Raise TokenizerError for a role that the template silently leaves out."""
        if role not in self._left_out:
            probe, user = {"role": role, "content": _PROBE}, {"role": "user", "content": "a"}
            messages = [user, {"role": "assistant", "content": "a"}, probe] if role == "tool" else [probe, user]
            try:
                self._left_out[role] = _PROBE not in self._render(messages, True)
            except TokenizerError:  # rendering the conversation will say so
                self._left_out[role] = False
        if self._left_out[role]:
            raise TokenizerError(f"{self._source}: its chat template leaves out what the role {role!r} says.")

    def _hide(self, messages: Sequence[Mapping[str, Any]], hidden: list[str]) -> list[Message]:
        """The messages with a stand-in for each control token spelled in them; what it stands for goes to `hidden`."""
        _check(messages, self._source)
        for role in sorted({message["role"] for message in messages} - {"user", "assistant"}):
            self._check_role(role)
        return [{**self._hidden_in(dict(message), hidden), "role": message["role"]} for message in messages]

    def _hide_tools(self, tools: Sequence[Mapping[str, Any]] | None, hidden: list[str]) -> list[Message] | None:
        return None if tools is None else self._hidden_in(list(tools), hidden)

    def _hidden_in(self, value: Any, hidden: list[str]) -> Any:
        """The same value, a stand-in for each control token in its texts, and in the keys of its objects."""

        def stand_in(found: re.Match) -> str:
            """Remember the control token that was found; return its stand-in."""
            hidden.append(found[0])
            return f"{_BEGIN}{len(hidden) - 1}{_END}"

        if isinstance(value, str):
            return self._seal(self._spelled.sub(stand_in, value), stand_in)
        if isinstance(value, Mapping):
            # Keys keep their ends, by which the template finds them.
            return {self._spelled.sub(stand_in, key): self._hidden_in(part, hidden) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._hidden_in(part, hidden) for part in value]
        return value

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

    def _render(self, messages: list[Message], add_generation_prompt: bool, tools: list[Message] | None = None) -> str:
        return self._template.render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            documents=None,
            **self._tokenizer.special_names(),
        )

    def _encode(self, text: str, hidden: list[str], place: Place = "start") -> tuple[list[int], Place]:
        """Ids of rendered text that stands at `place`, and the place of what follows it."""
        ids, position = [], 0
        for found in [*self._written.finditer(text), None]:
            segment = text[position : found.start() if found else len(text)]
            if segment:
                words = _STANDING_IN.sub(lambda m: hidden[int(m[1])] if int(m[1]) < len(hidden) else "", segment)
                ids += self._tokenizer.encode_segment(words, place)
                place = "continued"
            if found:
                ids.append(self._id(found))
                position, place = found.end(), "behind_control"
        return ids, place

    def _id(self, found: re.Match) -> int:
        return self._controls[found.lastindex - 1][0]


@dataclass(frozen=True)
class _Ending:
    """What follows an answer: `rest` to the end of the text, `closing` up to its first control token, `control`."""

    rest: str
    closing: str
    control: int | None


def _check(messages: Sequence[Mapping[str, Any]], source: str) -> None:
    if not isinstance(messages, Sequence) or not messages:
        raise TokenizerError(f"{source}: the messages are {messages!r}; expected a list of at least one.")
    for message in messages:
        fits = isinstance(message, Mapping) and {"role", "content"} <= set(message) <= {"role", "content", *MORE_KEYS}
        if not fits or message["role"] not in ROLES or not isinstance(message["content"], str):
            raise TokenizerError(
                f"{source}: a message is {message!r}; expected a 'role' ({', '.join(ROLES)}) and a text as 'content'."
            )
