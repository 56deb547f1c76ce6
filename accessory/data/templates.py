"""From a record to text: which words are the prompt, which are learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from accessory.data.messages import Conversation, Message, Question, turn_keys
from accessory.data.omissions import UnusableRecord
from accessory.data.shapes import CHAT_OR_DIALOG, Said, Shape
from accessory.errors import TokenizerError, check_known
from accessory.tokenizer.chat import Chat

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def _alpaca(instruction: str, context: str) -> str:
    template = _ALPACA_INPUT if context else _ALPACA
    # One pass, so that braces inside the user's text stay as they are.
    return template.format(instruction=instruction, input=context)


PROMPT_TYPES: dict[str, Callable[[str, str], str]] = {
    "alpaca": _alpaca,
    "shortqa": lambda instruction, _: f"{instruction}\nAnswer the question using a single word or phrase.",
    "qg": lambda instruction, _: f"Generate a question whose answer is: {instruction}",
    "caption": lambda _instruction, _input: "",
    "none": lambda instruction, _: instruction,
}
"""Name of a template -> function of (instruction, input) giving the prompt."""
CHAT = "chat"
"""Name of the layout by the checkpoint's own chat template, without any prompt of ours."""
DIALOG = "dialog"
"""Name of the layout that --dialog gives conversations, where `prompt_type` is not `chat`."""
PROMPT_LAYOUTS = (*PROMPT_TYPES, CHAT, DIALOG)
"""All layouts that a question may have in training data."""

DIALOG_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
DIALOG_END = "\n###"
_ROLES = {"user": "Human", "assistant": "Assistant"}
_EMPTY = (None, "", [], {})


@dataclass(frozen=True)
class Segment:
    """A part of a document; `supervised` says whether its tokens are learned.

    If a chat template made the document, `ids` holds the tokens, start and end included, and `text` is empty.
    """

    text: str
    supervised: bool
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DialogPrompt:
    """The prompt of an answer in the `DIALOG` layout, in the pieces that training tokenizes one by one."""

    pieces: tuple[str, ...]


def format_prompt(instruction: str, context: str = "", prompt_type: str = "alpaca") -> str:
    """The prompt of a template. Raises `ConfigError` for a template we do not have."""
    check_known("prompt type", prompt_type, PROMPT_TYPES)
    return PROMPT_TYPES[prompt_type](instruction, context)


def layout_of(shape: Shape, asked: str | None, dialog: bool, has_chat_template: bool) -> str:
    """The prompt layout of records of a shape. asked: the `prompt_type` that the user wrote, if any."""
    if shape.is_text:
        return shape.layout
    if dialog and asked != CHAT:
        return DIALOG
    default = (CHAT if has_chat_template else DIALOG) if shape.layout == CHAT_OR_DIALOG else shape.layout
    return asked or default


def documents_of(said: Said, layout: str, chat: Chat | None = None, last_only: bool = False) -> list[list[Segment]]:
    """The documents of what a record says, in one of `PROMPT_LAYOUTS`; `chat` is the template of the layout CHAT.

    There is one, unless the template changes earlier turns of a conversation. last_only: only the last answer is
    learned. Raises `UnusableRecord`.
    """
    if layout == CHAT:
        documents = _by_template(conversation_from(said), chat)
    elif layout == DIALOG:
        documents = [_dialog(conversation_from(said))]
    else:
        documents = [_single(said, layout)]
    if not last_only:
        return documents
    learned = max(place for place, part in enumerate(documents[-1]) if part.supervised)
    return [[replace(part, supervised=place == learned) for place, part in enumerate(documents[-1])]]


def conversation_from(said: Said, system: str | None = None) -> Conversation:
    """A conversation, or a question and its answer as one, behind words of the `system` if there are any.

    Raises `UnusableRecord` for a plain text.
    """
    if isinstance(said, str):
        raise UnusableRecord("is plain text, which is no conversation")
    if isinstance(said, Conversation):
        return said
    first = [] if system is None else [{"role": "system", "content": system}]
    answer = {"role": "assistant", "content": said.output}
    messages = [*first, *question_messages(said.instruction, said.context), answer]
    return Conversation(messages, [message is answer for message in messages])


def question_from(said: Said, layout: str) -> Question:
    """A question, or a conversation of one question and its answer as one. Raises `UnusableRecord` for others."""
    if isinstance(said, Question):
        return said
    if [message["role"] for message in said.messages] != ["user", "assistant"]:
        raise UnusableRecord(
            f"is a conversation of {len(said.messages)} turns, and prompt_type {layout} lays out one question and its "
            "answer: give prompt_type: chat, or dialog"
        )
    question, answer = (message["content"] for message in said.messages)
    return Question(question, "", answer)


def each_question(said: Said) -> list[Question]:
    """The questions of a conversation, each with its answer alone (`preprocess: single_turn_llava`).

    A question at the end that has no answer is left out. Raises `UnusableRecord`.
    """
    messages = conversation_from(said).messages
    check_alternating(messages)
    words = [message["content"] for message in messages]
    return [Question(question, "", answer) for question, answer in zip(words[::2], words[1::2], strict=False)]


def question_messages(instruction: str, context: str = "") -> list[dict[str, str]]:
    """A question, its input below it, as the one message of a conversation that waits for its answer."""
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]


def question_prompt(
    question: str, context: str, layout: str, system: str | None = None
) -> str | list[dict[str, str]] | DialogPrompt:
    """The prompt of a question in one of `PROMPT_LAYOUTS`, as training lays it out. Raises `ConfigError` for others.

    system: the words of the system, which `chat` and `dialog` have a place for; absent: the layout's own.
    """
    if layout not in (CHAT, DIALOG):
        return format_prompt(question, context, layout)
    messages = question_messages(question, context)
    first = [] if system is None else [{"role": "system", "content": system}]
    if layout == CHAT:
        return first + messages
    segments = _dialog_segments([("Human", messages[0]["content"]), ("Assistant", "")], system)
    return DialogPrompt(tuple(segment.text for segment in segments[:-1]))


def conversation_prompt(
    turns: Sequence[tuple[str, str]], question: str, layout: str, system: str | None = None
) -> list[dict[str, str]] | DialogPrompt:
    """The prompt of a question that follows earlier ones and their answers (`turns`), in the layout CHAT or DIALOG.

    system: the words before the first turn; absent: the layout's own. Raises `ConfigError` for another layout.
    """
    check_known("layout of a conversation", layout, (CHAT, DIALOG))
    said = [pair for asked, answer in turns for pair in (("user", asked), ("assistant", answer))]
    if layout == CHAT:
        first = [] if system is None else [("system", system)]
        return [{"role": role, "content": words} for role, words in (*first, *said, ("user", question))]
    roles = [(_ROLES[role], words) for role, words in (*said, ("user", question), ("assistant", ""))]
    segments = _dialog_segments(roles, system)
    return DialogPrompt(tuple(segment.text for segment in segments[:-1]))


def _single(said: Said, layout: str) -> list[Segment]:
    if isinstance(said, str):
        return [Segment(said, True)]
    question = question_from(said, layout)
    prompt = format_prompt(question.instruction, question.context, layout)
    return [Segment(prompt, False)] * bool(prompt) + [Segment(question.output, True)]


def _by_template(said: Conversation, chat: Chat) -> list[list[Segment]]:
    try:
        documents = chat.documents(said.messages, said.learned, said.tools if chat.takes_tools else None)
    except TokenizerError as error:
        raise UnusableRecord(str(error)) from error
    return [[Segment("", learned, tuple(ids)) for ids, learned in segments] for segments in documents]


def _dialog(said: Conversation) -> list[Segment]:
    """Upstream's layout conv_v1_2; the assistant's words and their end are learned."""
    turns = list(zip(said.messages, said.learned, strict=True))[said.system is not None :]
    for message, _ in turns:
        if message["role"] not in _ROLES or "tool_calls" in message:
            found = "calls of tools" if "tool_calls" in message else f"a turn of the role {message['role']!r}"
            raise UnusableRecord(f"holds {found}, which the layout dialog has no place for; prompt_type: chat takes it")
    said_in_turn = [(_ROLES[message["role"]], message["content"]) for message, _ in turns]
    segments = _dialog_segments(said_in_turn, said.system)
    learned = [False, *(part for _, learned in turns for part in (False, learned))]
    return [Segment(part.text, flag) for part, flag in zip(segments, learned, strict=True)]


def _dialog_segments(turns: list[tuple[str, str]], system: str | None = None) -> list[Segment]:
    segments = [Segment((DIALOG_SYSTEM if system is None else system) + "\n", False)]
    for role, words in turns:
        segments.append(Segment(f"\n### {role}:" if len(segments) == 1 else f" {role}:", False))
        # The blank belongs to the words: vocabularies join it to the word that follows.
        segments.append(Segment(f" {words}{DIALOG_END}", role == "Assistant"))
    return segments


def check_alternating(messages: list[Message]) -> None:
    """Raise `UnusableRecord` unless question and answer alternate, the question first."""
    if any(message["role"] != ("user", "assistant")[place % 2] for place, message in enumerate(messages)):
        raise UnusableRecord("does not go from human to assistant and back, the human first")


def as_before(said: Said, layout: str) -> bool:
    """Whether earlier versions, too, would have made the documents of a record whose shape they knew."""
    if isinstance(said, str) or (isinstance(said, Conversation) and not said.plain):
        return False
    if isinstance(said, Question):
        return True
    roles = [message["role"] for message in said.messages]
    if layout == CHAT:
        return all(before in ("user", "tool") for before, role in pairwise([None, *roles]) if role == "assistant")
    return all(role == ("user", "assistant")[place % 2] for place, role in enumerate(roles))


def unused_keys(fields: dict[str, Any], shape: Shape, layout: str, tools: bool = False) -> list[str]:
    """The keys of a record that `documents_of` does not read, for a message; those with empty values are left out.

    tools: whether the functions that a conversation may call are laid out.
    """
    read = set(shape.reads) if shape.names is None else _keys_of(shape.names, layout)
    read = read | {"tools"} if tools else read - {"tools"}
    found = [key for key, value in fields.items() if key not in read and value not in _EMPTY]
    turns = next((fields[key] for key in shape.keys if isinstance(fields.get(key), list)), [])
    inner = {key for turn in turns for key, value in turn.items() if key not in turn_keys(turn) and value not in _EMPTY}
    key = shape.keys[0]
    return [repr(key) for key in found] + [f"{name!r} in {key}" for name in sorted(inner)]


@lru_cache
def _keys_of(names: tuple[str, str, str], layout: str) -> frozenset[str]:
    """The keys that a layout reads of a record with instruction, input and output under these names."""
    marks = ("\ufdd0", "\ufdd1")  # noncharacters, which no template holds
    prompt = PROMPT_TYPES.get(layout, "{}{}".format)(*marks)
    return frozenset({names[2], *(name for name, mark in zip(names, marks, strict=False) if mark in prompt)})
