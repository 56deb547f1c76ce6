"""Pictures: where they stand in a packed document."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PicturePlace:
    """Where a picture stands in a document: `rows` embeddings of `size` x `size` pixels, before BOS or behind it."""

    rows: int
    size: int
    before_start: bool
