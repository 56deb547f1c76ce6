"""From a record to text: which words are the prompt, which are learned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from accessory.data.records import kind, shown_keys
from accessory.errors import TokenizerError, check_known, nearest
from accessory.tokenizer.chat import ROLES, Chat

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
_ROLES = {"human": "Human", "user": "Human", "gpt": "Assistant", "assistant": "Assistant"}
_CHAT_ROLES = {**{"human": "user", "gpt": "assistant", "observation": "tool"}, **{role: role for role in ROLES}}
"""Name of a speaker -> role of its messages, for a chat template."""

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_TURN_KEYS = ("from", "value")
_EMPTY = (None, "", [], {})
_SHOWN = 40  # characters of a name in a message


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


class UnusableRecord(Exception):
    """A record that cannot be trained on; the message is the cause, equal for records of the same fault."""


def format_prompt(instruction: str, context: str = "", prompt_type: str = "alpaca") -> str:
    """The prompt of a template. Raises `ConfigError` for a template we do not have."""
    check_known("prompt type", prompt_type, PROMPT_TYPES)
    return PROMPT_TYPES[prompt_type](instruction, context)


def documents_of(
    fields: dict[str, Any], prompt_type: str, dialog: bool, llava: bool, chat: Chat | None
) -> list[list[Segment]]:
    """The documents of a record: one, unless the chat template `chat` changes earlier turns of a conversation.

    llava: whether `preprocess` takes instruction and output from the conversation. Raises `UnusableRecord`.
    """
    if llava and not dialog:
        fields = single_turn_llava(fields)
    if prompt_type != CHAT:
        return [conversation(fields) if dialog else single_turn(fields, prompt_type)]
    try:
        documents = chat.documents(conversation_messages(fields) if dialog else single_turn_messages(fields))
    except TokenizerError as error:
        raise UnusableRecord(str(error)) from error
    return [[Segment("", learned, tuple(ids)) for ids, learned in segments] for segments in documents]


def single_turn(fields: dict[str, Any], prompt_type: str) -> list[Segment]:
    """Segments of a record with `instruction`, `output` and perhaps `input`; no prompt where the template has none.

    Raises `UnusableRecord`.
    """
    instruction, context, output = _question_and_answer(fields, prompt_type)
    prompt = format_prompt(instruction, context, prompt_type)
    segments = [Segment(prompt, False)] * bool(prompt) + [Segment(output, True)]
    _check_text(segment.text for segment in segments)
    return segments


def single_turn_messages(fields: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a record with `instruction` and `output`, for a chat template. Raises `UnusableRecord`."""
    instruction, context, output = _question_and_answer(fields, CHAT)
    _check_text([instruction, context, output])
    return [*question_messages(instruction, context), {"role": "assistant", "content": output}]


def question_messages(instruction: str, context: str = "") -> list[dict[str, str]]:
    """A question, its input below it, as the one message of a conversation that waits for its answer."""
    return [{"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}]


def _question_and_answer(fields: dict[str, Any], prompt_type: str) -> tuple[str, str, str]:
    _check_media(fields)
    instruction = "" if prompt_type == "caption" and "instruction" not in fields else _text(fields, "instruction")
    context = "" if fields.get("input") is None else fields["input"]
    if not isinstance(context, str):
        raise UnusableRecord(f"'input' is {kind(context)}, expected text")
    output = _text(fields, "output")
    if not output.strip():
        raise UnusableRecord("'output' is empty")
    return instruction, context, output


def single_turn_llava(fields: dict[str, Any]) -> dict[str, str]:
    """The first question and answer of a conversation, as instruction and output. Raises `UnusableRecord`."""
    turns = _alternating(_turns(fields, _ROLES))
    if len(turns) < 2:
        raise UnusableRecord("'conversations' has fewer than two turns")
    return {"instruction": turns[0][1], "output": turns[1][1]}


def conversation(fields: dict[str, Any]) -> list[Segment]:
    """Segments of a conversation, upstream's layout conv_v1_2; the assistant's words and their end are learned."""
    segments = _dialog_segments(_alternating(_dialog(fields, _ROLES)))
    _check_text(segment.text for segment in segments)
    return segments


def question_prompt(question: str, context: str, layout: str) -> str | list[dict[str, str]] | DialogPrompt:
    """The prompt of a question in one of `PROMPT_LAYOUTS`, as training lays it out. Raises `ConfigError` for others."""
    if layout == CHAT:
        return question_messages(question, context)
    if layout == DIALOG:
        words = question_messages(question, context)[0]["content"]
        segments = _dialog_segments([("Human", words), ("Assistant", "")])
        return DialogPrompt(tuple(segment.text for segment in segments[:-1]))
    return format_prompt(question, context, layout)


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
    segments = _dialog_segments(roles, DIALOG_SYSTEM if system is None else system)
    return DialogPrompt(tuple(segment.text for segment in segments[:-1]))


def _dialog_segments(turns: list[tuple[str, str]], system: str = DIALOG_SYSTEM) -> list[Segment]:
    segments = [Segment(system + "\n", False)]
    for role, words in turns:
        segments.append(Segment(f"\n### {role}:" if len(segments) == 1 else f" {role}:", False))
        # The blank belongs to the words: vocabularies join it to the word that follows.
        segments.append(Segment(f" {words}{DIALOG_END}", role == "Assistant"))
    return segments


def conversation_messages(fields: dict[str, Any]) -> list[dict[str, str]]:
    """The messages of a conversation, for a chat template. Raises `UnusableRecord`."""
    turns = _dialog(fields, _CHAT_ROLES)
    _check_text(words for _, words in turns)
    said = [role for role, _ in turns]
    if any(role == "assistant" and before not in ("user", "tool") for before, role in pairwise([None, *said])):
        raise UnusableRecord("'conversations' holds an answer that follows no turn of the human or a tool")
    return [{"role": role, "content": words} for role, words in turns]


def _dialog(fields: dict[str, Any], roles: dict[str, str]) -> list[tuple[str, str]]:
    """Turns of which at least one can be learned."""
    turns = _turns(fields, roles)
    if all(role != roles["assistant"] for role, _ in turns):
        raise UnusableRecord("'conversations' has no turn of the assistant")
    return turns


def _alternating(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    if any(role != ("Human", "Assistant")[place % 2] for place, (role, _) in enumerate(turns)):
        raise UnusableRecord("'conversations' does not go from human to assistant and back, the human first")
    return turns


def _check_media(fields: dict[str, Any]) -> None:
    if found := [key for key in _MEDIA if fields.get(key)]:
        raise UnusableRecord(f"has {shown_keys(found)}, and there is no vision or audio part yet")


def _check_text(texts: Iterable[str]) -> None:
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord("holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from error


def _turns(fields: dict[str, Any], roles: dict[str, str]) -> list[tuple[str, str]]:
    _check_media(fields)
    turns = fields.get("conversations")
    if turns is not None and not isinstance(turns, list):
        raise UnusableRecord(f"'conversations' is {kind(turns)}, expected a list of turns")
    if not turns:
        single = "; instruction and output are learned without --dialog and preprocess" if "output" in fields else ""
        raise UnusableRecord(f"has no list {_missing(fields, 'conversations')}{single}")
    found = [_turn(turn, roles) for turn in turns]
    if any(role == roles["assistant"] and not words.strip() for role, words in found):
        raise UnusableRecord("'conversations' holds an empty answer")
    return found


def _turn(turn: Any, roles: dict[str, str]) -> tuple[str, str]:
    if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in _TURN_KEYS):
        found = f"it has {shown_keys(turn)}" if isinstance(turn, dict) else f"it is {kind(turn)}"
        raise UnusableRecord(f"'conversations' holds a turn without 'from' ({', '.join(roles)}) and 'value': {found}")
    speaker = turn["from"]
    if speaker not in roles:
        chat = "; prompt_type: chat takes it" if speaker in _CHAT_ROLES else ""
        raise UnusableRecord(
            f"'conversations' holds a turn from {speaker[:_SHOWN]!r}; expected {', '.join(roles)}{chat}"
        )
    return roles[speaker], turn["value"]


def _text(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        dialog = "; conversations are learned with --dialog" if "conversations" in fields else ""
        raise UnusableRecord(f"has no {_missing(fields, key)}{dialog}")
    if not isinstance(fields[key], str):
        raise UnusableRecord(f"{key!r} is {kind(fields[key])}, expected text")
    return fields[key]


def _missing(fields: dict[str, Any], key: str) -> str:
    """The rest of a sentence on a missing key: the keys that are there, and the one that may be meant."""
    hint = nearest(key, fields).replace(" Did you mean", "; did it mean").rstrip("?")
    return f"{key!r} among its keys {shown_keys(fields) or '(it has none)'}{hint}"


def unused_keys(fields: dict[str, Any], prompt_type: str, dialog: bool, llava: bool) -> list[str]:
    """The keys of a record that `documents_of` does not read, for a message; those with empty values are left out."""
    turns = fields["conversations"] if dialog or llava else []
    read = {"conversations"} if turns else _keys_of(prompt_type)
    found = [key for key, value in fields.items() if key not in read and value not in _EMPTY]
    inner = {key for turn in turns for key, value in turn.items() if key not in _TURN_KEYS and value not in _EMPTY}
    beyond = ["conversations after the first answer"] if turns and not dialog and len(turns) > 2 else []
    return [repr(key) for key in found] + [f"{key!r} in conversations" for key in sorted(inner)] + beyond


@lru_cache
def _keys_of(prompt_type: str) -> frozenset[str]:
    """The keys that a template reads of a record with a single question and answer."""
    marks = {"instruction": "\ufdd0", "input": "\ufdd1"}  # noncharacters, which no template holds
    prompt = PROMPT_TYPES.get(prompt_type, "{}{}".format)(*marks.values())
    return frozenset({"output", *(key for key, mark in marks.items() if mark in prompt)})
