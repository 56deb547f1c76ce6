"""Answers with reasoning in them, as text: whether a chat template laid one out whole, and how it is laid out else."""

from __future__ import annotations

import re

_TAG = r"[\w:]*think\w*"
_OPEN = re.compile(rf"<({_TAG})>\s*\Z")
_EMPTY = re.compile(rf"<({_TAG})>\s*</\1>\s*")
_TAGS = re.compile(rf"(</?{_TAG}>)")


def holds(asked: str, answer: str, content: str) -> bool:
    """Whether `answer`, said to `asked`, ends with all of `content`, blanks around its words and its reasoning aside.

    The tag that opens the reasoning may be what `asked` ends with.
    """
    opened = _OPEN.search(asked)
    said = (opened[0] if opened else "") + answer.rstrip()
    if said.endswith(content.strip()):
        return True
    parts = [part.strip() for part in _TAGS.split(content.strip())]
    return len(parts) > 1 and re.search(r"\s*".join(map(re.escape, parts)) + r"\Z", said) is not None


def laid_out(asked: str, framed: str, content: str) -> str:
    """What is said to `asked`: `content` as it is, behind what a template writes between the two.

    `framed` is the template's text up to another answer. Where `asked` leaves reasoning open, it is closed, so that
    readers of the answer tell the two apart; reasoning that `content` brings is not opened twice.
    """
    words, lead, opened = content.strip(), framed.removeprefix(asked), _OPEN.search(asked)
    if not framed.startswith(asked):
        lead = f"\n</{opened[1]}>\n\n" if opened else ""
    brings_reasoning = re.search(rf"</{_TAG}>", words)
    if opened and brings_reasoning:
        return words.removeprefix(f"<{opened[1]}>").lstrip()
    return (_EMPTY.sub("", lead) if brings_reasoning else lead) + words
