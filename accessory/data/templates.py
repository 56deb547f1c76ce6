"""From a record to text: which words are the prompt, which are learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accessory.data.records import kind
from accessory.errors import ConfigError, nearest

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

DIALOG_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
DIALOG_END = "\n###"
_ROLES = {"human": "Human", "user": "Human", "gpt": "Assistant", "assistant": "Assistant"}


@dataclass(frozen=True)
class Segment:
    """A stretch of a document; `supervised` says whether its tokens are learned."""

    text: str
    supervised: bool


class UnusableRecord(Exception):
    """A record that cannot be trained on; the message is the cause, equal for records of the same fault."""


def format_prompt(instruction: str, context: str = "", prompt_type: str = "alpaca") -> str:
    """The prompt of a template. Raises `ConfigError` for a template we do not have."""
    if prompt_type not in PROMPT_TYPES:
        known = ", ".join(PROMPT_TYPES)
        raise ConfigError(
            f"prompt type {prompt_type!r} is unknown.{nearest(prompt_type, PROMPT_TYPES)} Known: {known}."
        )
    return PROMPT_TYPES[prompt_type](instruction, context)


def single_turn(fields: dict[str, Any], prompt_type: str) -> list[Segment]:
    """Segments of a record with `instruction`, `output` and perhaps `input`; no prompt where the template has none.

    Raises `UnusableRecord`.
    """
    if fields.get("image"):
        raise UnusableRecord("has an image, and there is no vision part yet")
    instruction = "" if prompt_type == "caption" and "instruction" not in fields else _text(fields, "instruction")
    context = fields.get("input") or ""
    if not isinstance(context, str):
        raise UnusableRecord(f"'input' is {kind(context)}, expected text")
    output = _text(fields, "output")
    if not output.strip():
        raise UnusableRecord("'output' is empty")
    prompt = format_prompt(instruction, context, prompt_type)
    return _encodable([Segment(prompt, False)] * bool(prompt) + [Segment(output, True)])


def single_turn_llava(fields: dict[str, Any]) -> dict[str, Any]:
    """The first question and answer of a conversation, as instruction and output. Raises `UnusableRecord`."""
    turns = _turns(fields)
    if len(turns) < 2:
        raise UnusableRecord("'conversations' has fewer than two turns")
    return {"instruction": turns[0][1], "output": turns[1][1], "image": fields.get("image")}


def conversation(fields: dict[str, Any]) -> list[Segment]:
    """Segments of a conversation, upstream's layout conv_v1_2; the assistant's words and their end are learned."""
    if fields.get("image"):
        raise UnusableRecord("has an image, and there is no vision part yet")
    segments = [Segment(DIALOG_SYSTEM + "\n", False)]
    for role, words in _turns(fields):
        segments.append(Segment(f"\n### {role}:" if len(segments) == 1 else f" {role}:", False))
        # The blank belongs to the words: vocabularies join it to the word that follows.
        segments.append(Segment(f" {words}{DIALOG_END}", role == "Assistant"))
    if not any(segment.supervised for segment in segments):
        raise UnusableRecord("'conversations' has no turn of the assistant")
    return _encodable(segments)


def _encodable(segments: list[Segment]) -> list[Segment]:
    try:
        for segment in segments:
            segment.text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord("holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from error
    return segments


def _turns(fields: dict[str, Any]) -> list[tuple[str, str]]:
    turns = fields.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise UnusableRecord(f"has no list 'conversations'{_nearest_key(fields, 'conversations')}")
    found = [_turn(turn) for turn in turns]
    if any(role != ("Human", "Assistant")[place % 2] for place, (role, _) in enumerate(found)):
        raise UnusableRecord("'conversations' does not go from human to assistant and back, the human first")
    if any(role == "Assistant" and not words for role, words in found):
        raise UnusableRecord("'conversations' holds an empty answer")
    return found


def _turn(turn: Any) -> tuple[str, str]:
    role = _ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise UnusableRecord(f"'conversations' holds a turn without 'from' ({', '.join(_ROLES)}) and 'value'")
    return role, turn["value"].replace("<image>", "").strip()


def _text(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        raise UnusableRecord(f"has no {key!r}{_nearest_key(fields, key)}")
    if not isinstance(fields[key], str):
        raise UnusableRecord(f"{key!r} is {kind(fields[key])}, expected text")
    return fields[key]


def _nearest_key(fields: dict[str, Any], key: str) -> str:
    hint = nearest(key, fields)
    return hint.replace(" Did you mean", "; did it mean").rstrip("?") if hint else ""
