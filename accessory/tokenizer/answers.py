"""Answers with reasoning in them, as text: whether a chat template laid one out whole, and how it is laid out else."""

from __future__ import annotations

import re

_TAG = r"[\w:]*think\w*"
_OPEN = re.compile(rf"<({_TAG})>\s*\Z")
_CLOSE = re.compile(rf"</{_TAG}>")
_EMPTY = re.compile(rf"<({_TAG})>\s*</\1>\s*")
_TAGS = re.compile(rf"(</?{_TAG}>)")


def holds(asked: str, answer: str, content: str) -> bool:
    """Whether `answer`, said to `asked`, ends with all of `content`, blanks around its words and its reasoning aside.

    The tag that opens the reasoning may be what `asked` ends with; left open, or opened twice, it is not.
    """
    opened, said = _OPEN.search(asked), answer.rstrip()
    if opened and (not _CLOSE.search(answer) or answer.lstrip().startswith(f"<{opened[1]}>")):
        return False
    if _CLOSE.search(content) and _EMPTY.search(answer) and not _EMPTY.search(content):
        return False
    said = (opened[0] if opened else "") + said
    if said.endswith(content.strip()):
        return True
    parts = [part.strip() for part in _TAGS.split(content.strip())]
    return len(parts) > 1 and re.search(r"\s*".join(map(re.escape, parts)) + r"\Z", said) is not None


def laid_out(asked: str, framed: str, content: str) -> str:
    """What is said to `asked`: `content` as it is, behind what a template writes between the two.

    `framed` is the template's text up to another answer. Where `asked` leaves reasoning open, it is closed, so that
    readers of the answer tell the two apart; reasoning that `content` brings is not opened twice.
    """
    words, opened = content.strip("\n").rstrip(), _OPEN.search(asked)
    lead = framed[len(asked) :] if framed.startswith(asked) else ""
    if _CLOSE.search(words):
        return words.lstrip().removeprefix(f"<{opened[1]}>").lstrip() if opened else _EMPTY.sub("", lead) + words
    if opened and not _CLOSE.search(lead):
        closed = re.search(rf"</{opened[1]}>\s*\Z", framed)
        lead = closed[0] if closed else f"\n</{opened[1]}>\n\n"
    return lead + words
