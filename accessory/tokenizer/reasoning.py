"""Answers with reasoning (`<think>`): whether a chat template wrote one completely, and if not, how to write it."""

from __future__ import annotations

import re

_TAG = r"[\w:]*think\w*"
_OPEN = re.compile(rf"<({_TAG})>\s*\Z")
_CLOSE = re.compile(rf"</{_TAG}>")
_EMPTY = re.compile(rf"<({_TAG})>\s*</\1>\s*")
_TAGS = re.compile(rf"(</?{_TAG}>)")


def is_whole(asked: str, answer: str, content: str) -> bool:
    """Whether `answer`, as a template wrote it after the prompt `asked`, ends with all of the message `content`.

    Blanks around words and reasoning may differ. The prompt may open the reasoning; an answer that then leaves it open,
    or opens it again, is not whole.
    """
    opened, said = _OPEN.search(asked), answer.rstrip()
    if opened and (not _CLOSE.search(answer) or answer.lstrip().startswith(f"<{opened[1]}>")):
        return False
    if 0 < len(_CLOSE.findall(content)) < len(_CLOSE.findall(answer)):
        return False
    said = (opened[0] if opened else "") + said
    if said.endswith(content.strip()):
        return True
    parts = [part.strip() for part in _TAGS.split(content.strip())]
    return len(parts) > 1 and re.search(r"\s*".join(map(re.escape, parts)) + r"\Z", said) is not None


def written_whole(asked: str, framed: str, content: str) -> str:
    """The answer to the prompt `asked`: what the template writes between the two, then `content` unchanged.

    `framed` is what the template writes, from the beginning on, before another answer. If the prompt opens reasoning
    and `content` has none, it is closed first, so that readers can tell it from the answer; if `content` has some, it
    is not opened twice.
    """
    words, opened = content.strip("\n").rstrip(), _OPEN.search(asked)
    lead = framed[len(asked) :] if framed.startswith(asked) else ""
    if _CLOSE.search(words):
        return words.lstrip().removeprefix(f"<{opened[1]}>").lstrip() if opened else _EMPTY.sub("", lead) + words
    if opened and not _CLOSE.search(lead):
        closed = re.search(rf"</{opened[1]}>\s*\Z", framed)
        lead = closed[0] if closed else f"\n</{opened[1]}>\n\n"
    return lead + words
