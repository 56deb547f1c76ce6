"""What a record says: a question and its answer, or a conversation, read from turns or from a text with marks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from accessory.data.omissions import UnusableRecord
from accessory.data.records import kind, shown_keys
from accessory.errors import nearest
from accessory.tokenizer.chat import ROLES

Message = dict[str, Any]
"""`role` (of `ROLES`), `content` (a text), and what else a chat template may lay out: `tool_calls`, `name`, ..."""

_SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool", **{role: role for role in ROLES}}
_LATER_SPEAKERS = {
    "function_call": "assistant", "function_response": "tool", "function": "tool", "chatgpt": "assistant",
    "bot": "assistant", "prompter": "user",
}  # fmt: skip
"""Name of a speaker -> role of its messages; the second table holds those that earlier versions refused."""
_TURN_KEYS = (("from", "value"), ("role", "content"))
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_SHOWN = 40  # characters of a name in a message


@dataclass(frozen=True)
class Question:
    """A question, an input that belongs to it or the empty string, and the answer."""

    instruction: str
    context: str
    output: str


@dataclass(frozen=True)
class Conversation:
    """Messages in their order, and which of them are learned.

    tools: functions that the assistant may call, as JSON schemas. plain: whether earlier versions read it, too.
    """

    messages: list[Message]
    learned: list[bool]
    tools: list[dict[str, Any]] | None = None
    plain: bool = True

    @property
    def system(self) -> str | None:
        """The words of the system before the first turn, if there are any."""
        first = self.messages[0]
        return first["content"] if first["role"] == "system" else None


def read_question(fields: dict[str, Any], names: tuple[str, str, str], needs_instruction: bool = True) -> Question:
    """The question of a record with texts under `names`: instruction, input, output. Raises `UnusableRecord`."""
    check_media(fields)
    instruction_key, context_key, output_key = names
    optional = not needs_instruction and instruction_key not in fields
    instruction = "" if optional else _text(fields, instruction_key)
    context = "" if fields.get(context_key) is None else fields[context_key]
    if not isinstance(context, str):
        raise UnusableRecord(f"{context_key!r} is {kind(context)}, expected text")
    output = _text(fields, output_key)
    if not output.strip():
        raise UnusableRecord(f"{output_key!r} is empty")
    return checked(Question(instruction, context, output))


def read_text(fields: dict[str, Any], key: str) -> str:
    """The plain text of a record. Raises `UnusableRecord`."""
    check_media(fields)
    text = _text(fields, key)
    if not text.strip():
        raise UnusableRecord(f"{key!r} is empty")
    check_text([text])
    return text


def read_turns(fields: dict[str, Any], key: str) -> Conversation:
    """The conversation of the turns in a list, in any order that holds an answer. Raises `UnusableRecord`."""
    check_media(fields)
    if key not in fields:
        raise UnusableRecord(f"has no {missing(fields, key)}")
    turns = fields[key]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else kind(turns)
        raise UnusableRecord(f"{key!r} is {found}, expected a list of turns")
    if all(isinstance(turn, dict) and "text" in turn and not {"from", "role"} & turn.keys() for turn in turns):
        # OL-CC names nobody: they take turns.
        turns = [{"from": ("human", "gpt")[place % 2], "value": turn["text"]} for place, turn in enumerate(turns)]
    messages = [_message(turn, key) for turn in turns]
    plain = key == "conversations" and all(isinstance(t.get("value"), str) and t["from"] in _SPEAKERS for t in turns)
    weights = [turn.get("weight", 1) != 0 for turn in turns] if key == "messages" else None
    return conversation_of(messages, key, weights, _tools(fields), plain)


def read_marked(fields: dict[str, Any], key: str, human: str, assistant: str) -> Conversation:
    """The conversation of a text in which regular expressions mark where turns begin. Raises `UnusableRecord`.

    Blanks around a turn belong to the marks. Words before the first mark are the system's.
    """
    check_media(fields)
    text = _text(fields, key)
    first, *parts = re.split(f"({human}|{assistant})", text)
    messages = [{"role": "system", "content": first.strip()}] if first.strip() else []
    for mark, words in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if re.fullmatch(human, mark) else "assistant"
        messages.append({"role": role, "content": words.strip()})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # a mark at the end, where nothing was said
    return conversation_of(messages, key, plain=False)


def conversation_of(
    messages: list[Message],
    key: str,
    weights: Sequence[bool] | None = None,
    tools: list[dict[str, Any]] | None = None,
    plain: bool = True,
) -> Conversation:
    """A conversation of `messages` found under `key`; `weights` says which answers may be learned, absent: all.

    An answer that stands before any question is laid out and not learned. Raises `UnusableRecord` where none is left.
    """
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise UnusableRecord(f"{key!r} has no turn of the assistant")
    if any(not message["content"].strip() and "tool_calls" not in message for message in answers):
        raise UnusableRecord(f"{key!r} holds an empty answer")
    asked, learned = False, []
    for place, message in enumerate(messages):
        asked = asked or message["role"] in ("user", "tool")
        learned.append(message["role"] == "assistant" and asked and (weights is None or weights[place]))
    if not any(learned):
        raise UnusableRecord(f"{key!r} holds no answer to learn: none follows a turn of the human or a tool")
    return checked(Conversation(messages, learned, tools, plain))


def checked(said: Question | Conversation) -> Question | Conversation:
    """The same. Raises `UnusableRecord` where something in it is no text."""
    if isinstance(said, Question):
        check_text((said.instruction, said.context, said.output))
    else:
        check_text(message["content"] for message in said.messages)
        others = [{name: more for name, more in message.items() if name != "content"} for message in said.messages]
        if said.tools or any(len(other) > 1 for other in others):
            check_text([json.dumps([others, said.tools], ensure_ascii=False)])
    return said


def check_media(fields: dict[str, Any]) -> None:
    """Raise `UnusableRecord` for a record with images, video or audio."""
    if found := [key for key in _MEDIA if fields.get(key)]:
        hint = " (docs/vision.md: which models do)" if {"image", "images"}.issuperset(found) else ""
        raise UnusableRecord(f"has {shown_keys(found)}, which the model does not take{hint}")


def check_text(texts: Iterable[str]) -> None:
    """Raise `UnusableRecord` for texts that cannot be encoded."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord("holds half of a surrogate pair (\\ud800 to \\udfff), which is no text") from error


def missing(fields: dict[str, Any], key: str) -> str:
    """The rest of a sentence that begins "has no": the key, those that are there, and the one that may be meant."""
    hint = nearest(key, fields).replace(" Did you mean", "; did it mean").rstrip("?")
    return f"key {key!r}, {'only ' + shown_keys(fields) if fields else 'nor any other'}{hint}"


def turn_keys(turn: dict[str, Any]) -> tuple[str, ...]:
    """The keys of a turn that are read."""
    named = next((keys for keys in _TURN_KEYS if keys[0] in turn), ("text",))
    return (*named, "tool_calls", "name", "tool_call_id", "weight") if named == _TURN_KEYS[1] else named


def _message(turn: Any, key: str) -> Message:
    role_key, words_key = next((k for k in _TURN_KEYS if isinstance(turn, dict) and k[0] in turn), _TURN_KEYS[0])
    if not isinstance(turn, dict) or not isinstance(turn.get(role_key), str):
        found = f"it has {shown_keys(turn)}" if isinstance(turn, dict) else f"it is {kind(turn)}"
        raise UnusableRecord(f"{key!r} holds a turn without 'from' and 'value', or 'role' and 'content': {found}")
    speakers = _SPEAKERS | _LATER_SPEAKERS
    speaker = turn[role_key]
    if speaker not in speakers:
        raise UnusableRecord(f"{key!r} holds a turn from {speaker[:_SHOWN]!r}; expected {', '.join(speakers)}")
    calls = _tool_calls(turn["tool_calls"], key) if role_key == "role" and turn.get("tool_calls") else None
    message: Message = {"role": speakers[speaker], "content": _content(turn, words_key, key, bool(calls))}
    if speaker == "function_call" and (call := _call_in(message["content"])):
        calls, message["content"] = [call], ""
    named = ("name", "tool_call_id") if role_key == "role" else ()
    return (
        message | ({"tool_calls": calls} if calls else {}) | {k: turn[k] for k in named if isinstance(turn.get(k), str)}
    )


def _content(turn: dict[str, Any], words_key: str, key: str, may_lack: bool) -> str:
    """The words of a turn: a text, or a list of parts that are texts."""
    content = turn.get(words_key)
    if content is None and may_lack:
        return ""
    if isinstance(content, list):
        return "".join(_part(part, key) for part in content)
    if not isinstance(content, str):
        raise UnusableRecord(f"{key!r} holds a turn whose {words_key!r} is {kind(content)}, expected text")
    return content


def _part(part: Any, key: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise UnusableRecord(
            f"{key!r} holds a part of type {str(part['type'])[:_SHOWN]!r}, which the model does not take"
        )
    if not isinstance(text, str):
        raise UnusableRecord(f"{key!r} holds a part of a turn that is {kind(part)}, expected a text")
    return text


def _tool_calls(calls: Any, key: str) -> list[dict[str, Any]]:
    """Calls of functions, their arguments as objects, which is what chat templates expect."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name, arguments = (function.get("name"), function.get("arguments")) if isinstance(function, dict) else (0, 0)
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise UnusableRecord(
                f"{key!r} holds tool_calls that are not a list of functions with a name and arguments (an object)"
            )
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**identity, "type": "function", "function": {"name": name, "arguments": arguments}})
    return found


def _call_in(content: str) -> dict[str, Any] | None:
    """The call that a turn of LLaMA-Factory's `function_call` writes as JSON; None where it is none."""
    try:
        call = json.loads(content)
    except ValueError:
        return None
    whole = isinstance(call, dict) and isinstance(call.get("name"), str) and isinstance(call.get("arguments"), dict)
    return {"type": "function", "function": {k: call[k] for k in ("name", "arguments")}} if whole else None


def _tools(fields: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The functions a record describes: a list, or a text that holds one as JSON."""
    tools = fields.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UnusableRecord("'tools' is a text that is no JSON, expected a list of functions") from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UnusableRecord(f"'tools' is {kind(tools)}, expected a list of functions")
    return tools


def _text(fields: dict[str, Any], key: str) -> str:
    if key not in fields:
        raise UnusableRecord(f"has no {missing(fields, key)}")
    if not isinstance(fields[key], str):
        raise UnusableRecord(f"{key!r} is {kind(fields[key])}, expected text")
    return fields[key]
