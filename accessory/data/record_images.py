"""The image of a record: which file is meant, and the record without it, as it is read further."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from typing import Any

from accessory.data.messages import Conversation, Question, check_text
from accessory.data.omissions import UnusableRecord
from accessory.data.records import Record, kind
from accessory.data.shapes import Said

IMAGE, IMAGES = "image", "images"
_NONE = (None, "")  # "": an empty cell of a table
_MARK = "<image>"  # in LLaVA's words: where the image is spoken of
_URL = re.compile(r"(?i)[a-z][a-z0-9+.-]*://|data:")


def captioned(record: Record) -> Record:
    """The record as `preprocess: caption` has it: `url` is the image, `caption` the output; of a list of them, one.

    Which one only depends on the record, so that each run takes the same.
    """
    if record.fault or "caption" not in record.fields:
        return record
    fields = dict(record.fields)
    said, image = fields.pop("caption"), fields.pop("url", fields.get(IMAGE))
    if isinstance(said, list) and said:
        digest = hashlib.blake2b(repr((image, said)).encode(errors="replace"), digest_size=8).digest()
        said = said[int.from_bytes(digest) % len(said)]
    return replace(record, fields={**fields, IMAGE: image, "output": said})


def without_image(record: Record) -> Record:
    """The record without its image."""
    named = {IMAGE, _key(record.fields)}
    return replace(record, fields={key: value for key, value in record.fields.items() if key not in named})


def image_name(fields: dict[str, Any]) -> str | None:
    """The path of a record's image, as the record has it; None without any. Raises `UnusableRecord`."""
    key = _key(fields)
    name = fields.get(key)
    if key == IMAGES and isinstance(name, list):
        if len(name) > 1:
            raise UnusableRecord(f"{key!r} holds several, and a document takes one")
        name = name[0]
    if name in _NONE:
        return None
    if not isinstance(name, str):
        raise UnusableRecord(f"{key!r} is {kind(name)}, expected the path of one image file")
    if _URL.match(name):
        raise UnusableRecord(f"{key!r} is a URL, and nothing is fetched: download it and give its path", name)
    check_text([name])
    return name


def _key(fields: dict[str, Any]) -> str:
    """The key under which a record's image is."""
    return IMAGES if fields.get(IMAGE) in _NONE and fields.get(IMAGES) else IMAGE


def without_marks(said: Said) -> Said:
    """What a record with an image says, without LLaVA's `<image>`. Raises `UnusableRecord` where no answer is left."""
    if isinstance(said, str):
        return _unmarked(said, needed=True)
    if isinstance(said, Question):
        words = (_unmarked(said.instruction), _unmarked(said.context), _unmarked(said.output, needed=True))
        return Question(*words)
    assert isinstance(said, Conversation)
    messages = [
        message | {"content": _unmarked(message["content"], needed=message["role"] == "assistant")}
        for message in said.messages
    ]
    return replace(said, messages=messages)


def _unmarked(words: str, needed: bool = False) -> str:
    if _MARK not in words:
        return words
    words = words.replace(_MARK, "").strip()
    if needed and not words:
        raise UnusableRecord(f"an answer holds {_MARK} and nothing else")
    return words
