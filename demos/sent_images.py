"""Images on their way between a page and its server: as text in a request, so that no files are kept or handed out."""

from __future__ import annotations

import base64
import binascii
import re

from accessory.data.pictures import Picture
from accessory.errors import ConfigError

MOST_IMAGE_BYTES = 10 << 20
MOST_IMAGE_REQUEST = MOST_IMAGE_BYTES * 4 // 3 + (1 << 20)
"""Bytes of a request that holds the largest image, in base64."""
LARGE = f"An image has at most {MOST_IMAGE_BYTES >> 20} MiB here."
_SENT = re.compile(r"data:[\w.+/-]*;base64,")


def image_bytes(sent: object) -> bytes | None:
    """The file that came over the network as a data URL; None for an empty one. Raises `ConfigError` for others."""
    if sent is None or sent == "":
        return None
    start = _SENT.match(sent) if isinstance(sent, str) else None
    if start is None:
        raise ConfigError("The image is no data URL in base64.")
    if len(sent) > MOST_IMAGE_REQUEST:
        raise ConfigError(LARGE)
    try:
        return base64.b64decode(sent[start.end() :], validate=True)
    except binascii.Error as error:
        raise ConfigError(f"The image is no base64 ({error}).") from error


def sendable(picture: Picture | None) -> str:
    """A data URL of a picture that holds its bytes, as the box takes it; empty for none."""
    return "" if picture is None else "data:image/png;base64," + base64.b64encode(picture.file).decode()
