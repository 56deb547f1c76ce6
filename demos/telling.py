"""How a page says what went wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import gradio

from accessory.errors import AccessoryError


@contextmanager
def told() -> Iterator[None]:
    """The page shows an error of ours in one line."""
    try:
        yield
    except AccessoryError as error:
        words = str(error)
        raise gradio.Error(words[:1].upper() + words[1:], duration=5, print_exception=False) from error
