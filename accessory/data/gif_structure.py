"""The blocks of a GIF, looked at before Pillow reads them: it joins the parts of comments in quadratic time."""

from __future__ import annotations

_MOST_COMMENTS = 1 << 16
_HEAD = 13  # bytes before the first palette
_IMAGE, _EXTENSION, _END, _COMMENT = 0x2C, 0x21, 0x3B, 0xFE


def gif_fault(data: bytes) -> str | None:
    """Why a whole file that begins as a GIF is not read, if it is not; up to where a second image begins.

    All extensions but comments must have the parts that Pillow reads of them: behind one without, it would go on
    reading where no part begins.
    """
    place, images, comments = _HEAD + _palette(data, 10), 0, 0
    while place < len(data) and data[place] != _END and images < 2:
        kind, begin = data[place], place
        if kind == _IMAGE:
            images, place = images + 1, _behind(data, place + 11 + _palette(data, place + 9))
        elif kind == _EXTENSION:
            place = _behind(data, place + 2)
            is_comment = data[begin + 1 : begin + 2] == bytes([_COMMENT])
            comments += (place - begin) * is_comment
            if not is_comment and place <= len(data) and place - begin <= _shortest(data, begin):
                return "is damaged (an extension without a part)"
            if comments > _MOST_COMMENTS:
                return f"has more than {_MOST_COMMENTS >> 10} KiB of comments"
        else:
            place += 1
    return None


def _behind(data: bytes, place: int) -> int:
    """Where the parts that begin at `place` end: each has its length before it, the last one is empty."""
    while place < len(data) and (length := data[place]):
        place += 1 + length
    return place + 1


def _shortest(data: bytes, begin: int) -> int:
    """The length of the extension at `begin` if it lacks a part: the first, or the second of one about repetitions."""
    first = data[begin + 3 : begin + 3 + data[begin + 2]]
    return 4 + len(first) if first.startswith(b"NETSCAPE2.0") else 3


def _palette(data: bytes, place: int) -> int:
    """Bytes of the palette that the flags at `place` speak of."""
    flags = data[place] if place < len(data) else 0
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
