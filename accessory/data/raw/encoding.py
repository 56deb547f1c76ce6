"""Documents of raw text into tokens, long ones part by part."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from accessory.data.raw.documents import Piece
from accessory.tokenizer import Tokenizer

PART = 1 << 14
"""Characters of a long text that are encoded at a time, at the least."""


def parts_of(text: str) -> Iterator[str]:
    """A text of up to twice `PART` characters; a longer one in parts, cut behind a line, else a word, else anywhere."""
    at = 0
    while len(text) - at > 2 * PART:
        near, last = at + PART, at + 2 * PART
        end = max(text.rfind("\n", near, last) + 1, 0) or max(text.rfind(" ", near, last), 0) or last
        yield text[at:end]
        at = end
    yield text[at:]


def encoded_parts(piece: Piece, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """The tokens of a piece, int32 [N], part by part: the document's between the tokenizer's start ids and EOS."""
    before = list(tokenizer.start_ids) if piece.begins else []
    waiting, continues = None, not piece.begins
    for part in parts_of(piece.text):
        if waiting is not None:
            yield np.array(waiting, dtype=np.int32)
        waiting, before = before + tokenizer.encode(part, continuation=continues), []
        continues = True
    yield np.array([*waiting, *([tokenizer.eos_id] if piece.ends else ())], dtype=np.int32)
