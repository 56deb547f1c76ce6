"""Which shape a record has, told from its keys, and what it says; shapes are named after who publishes data so."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from accessory.data.messages import (
    Conversation,
    Question,
    conversation_of,
    missing,
    read_marked,
    read_question,
    read_text,
    read_turns,
)
from accessory.data.omissions import UnusableRecord
from accessory.data.records import shown_keys

Fields = dict[str, Any]
Said = Question | Conversation | str
"""What a record says: a question and its answer, a conversation, or a plain text."""

CHAT_OR_DIALOG = "chat or dialog"
"""In the table: laid out by the checkpoint's chat template, or as `dialog` where it has none."""


@dataclass(frozen=True)
class Shape:
    """Records of one kind. keys: those that all of them have. layout: the prompt layout, where none is asked for.

    what: what such a record holds, and which data sets have it, for docs/data.md.
    read: what a record says. names: of the keys with instruction, input and output, for questions. perhaps: further
    keys that are read. told: whether a record that has the keys is of this shape; absent: always.
    """

    keys: tuple[str, ...]
    layout: str
    read: Callable[[Fields], Said]
    what: str
    names: tuple[str, str, str] | None = None
    perhaps: tuple[str, ...] = ()
    told: Callable[[Fields], bool] = lambda fields: True

    def fits(self, fields: Fields) -> bool:
        """Whether a record has this shape."""
        return all(key in fields for key in self.keys) and self.told(fields)

    @property
    def is_text(self) -> bool:
        """Whether the records are plain texts, without a prompt."""
        return self.layout == "none" and self.names is None

    @property
    def reads(self) -> tuple[str, ...]:
        """All keys that are read."""
        return (*self.keys, *self.perhaps)


def _questions(instruction: str, output: str, layout: str, what: str, context: str = "", **more: Any) -> Shape:
    names = (instruction, context, output)
    perhaps = (context,) * bool(context)
    return Shape((instruction, output), layout, partial(read_question, names=names), what, names, perhaps, **more)


def _turns(key: str, what: str, perhaps: tuple[str, ...] = ("tools",)) -> Shape:
    return Shape((key,), CHAT_OR_DIALOG, partial(read_turns, key=key), what, perhaps=perhaps)


def _marked(key: str, human: str, assistant: str, what: str) -> Shape:
    def told(fields: Fields) -> bool:
        """Whether a record of these fields holds both marks."""
        return isinstance(fields[key], str) and human in fields[key] and assistant in fields[key]

    read = partial(read_marked, key=key, human=re.escape(human), assistant=re.escape(assistant))
    return Shape((key,), CHAT_OR_DIALOG, read, f"{what}: turns begin with `{human}` and `{assistant}`", told=told)


_ALPACA = ("instruction", "input", "output")
_COMPLETION = ("prompt", "completion")
_BELLE = ("Human:", "Assistant:")
_GORILLA = ("###Instruction:", "###Output:")
_HH = (r"\n\nHuman:", r"\n\nAssistant:")


def _read_belle(fields: Fields) -> Conversation:
    """BELLE's dialogues: earlier turns as one text in `instruction`, which ends where the answer, `output`, begins."""
    answer = read_question(fields, ("instruction", "", "output"))
    whole = {"instruction": f"\n{answer.instruction.strip()}{answer.output}"}
    return read_marked(whole, "instruction", *(rf"\n{mark}" for mark in _BELLE))


def _is_belle(fields: Fields) -> bool:
    words = fields["instruction"]
    return isinstance(words, str) and words.lstrip().startswith(_BELLE[0]) and words.rstrip().endswith(_BELLE[1])


def _is_gorilla(fields: Fields) -> bool:
    words = fields["code"]
    return isinstance(words, str) and words.lstrip().startswith(_GORILLA[0]) and _GORILLA[1] in words


def _read_gorilla(fields: Fields) -> Question:
    instruction, _, output = read_text(fields, "code").partition(_GORILLA[1])
    return Question(instruction.strip().removeprefix(_GORILLA[0]).strip(), "", output.strip())


def _read_chosen(fields: Fields) -> Said:
    """The better one of two answers: whole messages, a text with marks, or, with `prompt`, an answer to it."""
    chosen, prompt = fields.get("chosen"), fields.get("prompt")
    if isinstance(chosen, list):
        first = prompt if isinstance(prompt, list) and chosen[: len(prompt)] != prompt else []
        return read_turns({"chosen": [*first, *chosen]}, "chosen")
    if isinstance(chosen, str) and "\n\nHuman:" not in chosen and isinstance(prompt, str):
        return read_question(fields, ("prompt", "", "chosen"))
    return read_marked(fields, "chosen", *_HH)


def _are_messages(fields: Fields) -> bool:
    return all(isinstance(fields[key], list) for key in _COMPLETION)


def _read_completion(fields: Fields) -> Conversation:
    """TRL's messages, of which those of the completion are learned."""
    prompt, completion = (fields.get(key) if isinstance(fields.get(key), list) else [] for key in _COMPLETION)
    whole = read_turns({"completion": [*prompt, *completion], "tools": fields.get("tools")}, "completion")
    weights = [place >= len(prompt) for place in range(len(whole.messages))]
    return conversation_of(whole.messages, "completion", weights, whole.tools, plain=False)


SHAPES: dict[str, Shape] = {
    "belle": Shape(
        ("instruction", "output"), CHAT_OR_DIALOG, _read_belle, "BELLE's dialogues: `instruction` holds the turns from "
        "`Human:` to `Assistant:`", perhaps=("input",), told=_is_belle,
    ),
    "alpaca": _questions(
        "instruction", "output", "alpaca", "an instruction, perhaps its `input`, and the answer: Alpaca, BELLE", "input"
    ),
    "gorilla": Shape(
        ("code",), "alpaca", _read_gorilla, "Gorilla's APIBench: `###Instruction:` with a question, "
        "`###Output:` with its answer", told=_is_gorilla,
    ),
    "openai": _turns("messages", "messages with `role` and `content`: OpenAI's fine-tuning, UltraChat"),
    "sharegpt": _turns("conversations", "turns with `from` and `value`: ShareGPT, Vicuna, OpenHermes"),
    "lmsys": _turns("conversation", "messages with `role` and `content`: LMSYS-Chat, WildChat"),
    "olcc": _turns("turns", "turns with `text`, human and assistant by turns: OL-CC", ()),
    "hh-rlhf": Shape(
        ("chosen",), CHAT_OR_DIALOG, _read_chosen, "the better one of two dialogues, as a text with `Human:` and "
        "`Assistant:` or as messages; or, with `prompt`, an answer: HH-RLHF, UltraFeedback", perhaps=("prompt",),
    ),
    "dolly": _questions(
        "instruction", "response", "alpaca", "an instruction, perhaps its `context`, and the answer: Dolly", "context"
    ),
    "trl": Shape(
        _COMPLETION, CHAT_OR_DIALOG, _read_completion, "two lists of messages, the second learned: TRL",
        perhaps=("tools",), told=_are_messages,
    ),
    "prompt-completion": _questions(*_COMPLETION, "none", "the text before and the text to learn: Self-Instruct"),
    "prompt-response": _questions("prompt", "response", "alpaca", "a question and its answer"),
    "question-answer": _questions("question", "answer", "alpaca", "a question and its answer: GSM8K"),
    "input-output": _questions("input", "output", "none", "the text before and the text to learn: qlora, LongForm"),
    "oasst1": _marked("text", "### Human:", "### Assistant:", "OpenAssistant as Guanaco has it"),
    "chip2": _marked("text", "<human>:", "<bot>:", "OIG's chip2"),
    "text": Shape(("text",), "none", partial(read_text, key="text"), "any other text: all of it is learned"),
    "caption": Shape(
        ("output",), "caption", partial(read_question, names=_ALPACA, needs_instruction=False), "an answer without a "
        "question; only where `prompt_type: caption` or `shape: caption` asks for it", _ALPACA,
    ),
}  # fmt: skip
"""Name -> shape, in the order in which a record is compared with them."""
OTHER_NAMES = {
    "alpaca-clean": "alpaca", "self-instruct": "prompt-completion", "longform": "input-output", "guanaco": "oasst1",
    "vicuna": "sharegpt", "messages": "openai",
}  # fmt: skip
"""Names of data sets, as qlora calls them, and of keys -> the shape that they have."""
_LIKE = {
    "instruction": ("instruction", "question", "prompt", "query", "input", "problem", "user", "human", "source", "q"),
    "output": (
        "output", "answer", "response", "completion", "reply", "solution", "assistant", "bot", "target", "a", "chosen"
    ),
}  # fmt: skip
"""What other data sets call a question and an answer."""


def tell(records: Iterable[Fields], first: Sequence[str]) -> str | None:
    """The shape that most records have, of several the one met first; None where no record has any.

    first: shapes to compare a record with before those of the table.
    """
    told = Counter(filter(None, (shape_of(fields, first) for fields in records)))
    return told.most_common(1)[0][0] if told else None


def shape_of(fields: Fields, first: Sequence[str] = ()) -> str | None:
    """The shape of one record, if it has one."""
    order = dict.fromkeys((*first, *(name for name in SHAPES if name != "caption")))  # which must be asked for
    return next((name for name in order if SHAPES[name].fits(fields)), None)


def unfit(fields: Fields) -> UnusableRecord:
    """The cause for a record of no known shape: its keys, the nearest shape, and what would map them."""
    name, columns = _nearest(fields)
    if columns:
        mapped = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
        return UnusableRecord(
            f"has the keys {shown_keys(fields)}, no shape known here; the nearest is {name} "
            f"({', '.join(SHAPES[name].keys)}): give 'columns: {{{mapped}}}' in the YAML"
        )
    if name:
        absent = next(key for key in SHAPES[name].keys if key not in fields)
        return UnusableRecord(f"has no {missing(fields, absent)}; the nearest shape is {name}")
    return UnusableRecord(
        f"has the keys {shown_keys(fields) or '(none)'}, no shape known here; say which are question and answer in the "
        "YAML: 'columns: {instruction: KEY, output: KEY}'"
    )


def known_shapes() -> str:
    """All shapes and the keys that tell them, for a message."""
    return ", ".join(f"{name} ({', '.join(shape.keys)})" for name, shape in SHAPES.items() if name != "caption")


def _nearest(fields: Fields) -> tuple[str | None, dict[str, str]]:
    """The shape that a record would have if some keys were called otherwise, and those: the shape's -> the record's.

    Without such keys: the shape that it has a part of, if any.
    """
    for key, value in fields.items():
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            named = "openai" if "role" in value[0] else "sharegpt"
            return named, {SHAPES[named].keys[0]: key}
    texts = [key for key, value in fields.items() if isinstance(value, str)]
    best: tuple[str | None, dict[str, str]] = (None, {})
    fewest = 3
    for name, shape in SHAPES.items():
        if shape.names is None or name == "caption":
            continue
        found = {key: _meant(key, kind, texts) for key, kind in zip(shape.keys, _LIKE, strict=True)}
        wrong = {key: theirs for key, theirs in found.items() if theirs is not None and key != theirs}
        if None not in found.values() and len(set(found.values())) == 2 and 0 < len(wrong) < fewest:
            best, fewest = (name, wrong), len(wrong)
    if best[0] is None:
        part = next((name for name, shape in SHAPES.items() if shape.names and set(shape.keys) & fields.keys()), None)
        return (part, {}) if part or len(texts) != 1 else ("text", {"text": texts[0]})
    return best


def _meant(key: str, kind: str, texts: list[str]) -> str | None:
    """The key among `texts` that may be meant by `key`: itself, a misspelling, or another name of the same thing."""
    if key in texts:
        return key
    close = difflib.get_close_matches(key, [text.lower() for text in texts], n=1, cutoff=0.8)
    lowered = {text.lower(): text for text in texts}
    named = next((lowered[word] for word in _LIKE[kind] if word in lowered), None)
    return lowered[close[0]] if close else named
