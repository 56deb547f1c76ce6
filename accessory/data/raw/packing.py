"""Writes the tokens of a file of raw text into a file of tokens: block by block, by several processes."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from accessory.data.raw.documents import Piece, TextReader
from accessory.data.raw.encoding import encoded_parts
from accessory.data.raw.files import RawFile
from accessory.data.raw.packed_file import PackedWriter
from accessory.data.raw.skipped import Skipped
from accessory.errors import DataError
from accessory.tokenizer import Tokenizer, open_tokenizer

BLOCK = 1 << 21
"""Bytes of text that a process encodes at a time."""
_tokenizer: Tokenizer  # of a process that encodes


class Encoded(NamedTuple):
    """A block's tokens int32 [N], how many documents end in it, and its pieces, without the text of those used."""

    tokens: np.ndarray
    documents: int
    pieces: list[Piece]


def encoded(reader: TextReader, tokenizer: Tokenizer, file: RawFile, start: int, stop: int) -> Encoded:
    """The tokens of a block's documents, each between the tokenizer's start ids and EOS. Raises `DataError`."""
    pieces = [*reader.read(file, start, stop)]
    used = [piece for piece in pieces if piece.text]
    parts = [part for piece in used for part in encoded_parts(piece, tokenizer)]
    told = [piece if piece.text is None else piece._replace(text="") for piece in pieces]
    return Encoded(np.concatenate(parts or [np.empty(0, np.int32)]), sum(piece.ends for piece in used), told)


@contextmanager
def encoders(tokenizer_path: Path, processes: int) -> Iterator[Executor]:
    """So many processes that encode with the tokenizer at a path."""
    context = multiprocessing.get_context("spawn")  # threads of a tokenizer do not live through a fork
    with ProcessPoolExecutor(processes, context, _open, (tokenizer_path,)) as pool:
        yield pool


def pack(
    file: RawFile, target: Path, reader: TextReader, tokenizer: Tokenizer, pool: Executor, ahead: int, most: float
) -> Iterator[int]:
    """Write `target`, a file of tokens; yields the tokens so far, after each block.

    ahead: blocks that are encoded beside the one that is written. most: share of documents that may be unusable.
    Raises `DataError`, and leaves nothing behind.
    """
    skipped = Skipped(most, print)
    with PackedWriter(target, tokenizer) as writer:
        for block in _in_order(pool, reader, file, ahead):
            skipped.count(file, block.pieces)
            writer.write(block.tokens, block.documents)
            yield writer.count
        if not writer.count:
            raise DataError(f"{file.path}: has no text.")


def _in_order(pool: Executor, reader: TextReader, file: RawFile, ahead: int) -> Iterator[Encoded]:
    waiting: deque[Future] = deque()
    try:
        for span in pairwise(reader.cut(file, BLOCK)):
            waiting.append(pool.submit(_encode, reader, file, *span))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(f"{file.path}: a process that encodes it was killed; is the memory full?") from error
    finally:
        for future in waiting:
            future.cancel()


def _open(tokenizer_path: Path) -> None:
    global _tokenizer
    _tokenizer = open_tokenizer(tokenizer_path)


def _encode(reader: TextReader, file: RawFile, start: int, stop: int) -> Encoded:
    return encoded(reader, _tokenizer, file, start, stop)
