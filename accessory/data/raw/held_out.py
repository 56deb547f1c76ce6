"""The validation file's first rows as documents that can be evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from accessory.data.corpus import Corpus
from accessory.data.omissions import Omissions
from accessory.data.raw.documents import TextReader
from accessory.data.raw.encoding import encoded_parts
from accessory.data.raw.files import RawFile, identity_of
from accessory.data.raw.order import documents_of
from accessory.data.raw.packed_file import PackedFile
from accessory.data.raw.skipped import Skipped
from accessory.data.raw.stream import Row
from accessory.errors import DataError
from accessory.tokenizer import Tokenizer

_BLOCK = 1 << 18  # bytes of text read at a time


def packed_rows(file: PackedFile, size: int, most: int | None, vocabulary: int) -> Iterator[Row]:
    """The first rows of a file of tokens, at `most` so many, in order; the last one may be shorter."""
    for at in range(0, max(len(file.tokens) - 1, 0), size):
        if most is not None and at >= most * size:
            return
        count = min(size + 1, len(file.tokens) - at)
        yield Row(*file.row(at, count, vocabulary), (file.file, at))


def text_rows(
    file: RawFile, reader: TextReader, tokenizer: Tokenizer, size: int, most: int | None, skipped: Skipped
) -> Iterator[Row]:
    """The same of a file of text, whose documents are joined in the order they have there. Raises `DataError`."""
    held, starts, given = np.empty(0, np.int32), np.empty(0, bool), 0
    for start, stop in pairwise(reader.cut(file, _BLOCK)):
        for piece in reader.read(file, start, stop):
            skipped.count(file, [piece])
            if not piece.text:
                continue
            for place, part in enumerate(encoded_parts(piece, tokenizer)):
                begins = piece.begins and place == 0
                held = np.concatenate([held, part])
                starts = np.concatenate([starts, np.arange(len(part)) == (0 if begins else -1)])
                while len(held) > size:
                    if given == most:
                        return
                    yield Row(held[: size + 1], starts[: size + 1], (file, piece.at))
                    held, starts, given = held[size:], starts[size:], given + 1
    if len(held) > 1 and given != most:
        yield Row(held, starts, (file, start))


def corpus_of(
    rows: Iterator[Row], file: RawFile, tokenizer: Tokenizer, across: bool, identity: dict[str, Any]
) -> Corpus:
    """The documents of `rows` as a corpus of which all tokens are learned. Raises `DataError` where there are none."""
    documents = [document.tokens for row in rows for document in documents_of(row, 0, across)]
    documents = [tokens for tokens in documents if len(tokens) > 1]
    if not documents:
        raise DataError(f"{file.path}: has no text to evaluate on.")
    offsets = np.cumsum([0, *map(len, documents)])
    arrays = {
        "tokens": np.concatenate(documents),
        "learned": np.ones(offsets[-1], dtype=bool),
        "offsets": offsets,
        "origins": np.zeros((len(documents), 3), dtype=np.int32),
    }
    return Corpus(arrays, Omissions([str(file.path)]), {**identity_of([file]), **identity}, tokenizer)
