"""The order of rows cut from files of tokens: every row of a pass once, anywhere at once, with nothing to remember."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from accessory.data.raw.files import identity_of
from accessory.data.raw.order import RowOrder, Shape
from accessory.data.raw.packed_file import PackedFile
from accessory.data.raw.stream import Row
from accessory.errors import DataError

_ROUNDS = 4
_WORD = (1 << 64) - 1


def shuffled(index: int, count: int, key: int) -> int:
    """Where a permutation of `count` numbers, which `key` chooses, puts `index`.

    It is a Feistel network (Luby and Rackoff 1988) over the next larger power of 4, walked until it falls below
    `count`: nothing has to be stored, however many numbers there are.
    """
    half = max((count - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mixed(right + (turn << 48) + _mixed(key)) & mask)
        index = left << half | right
        if index < count:
            return index


def _mixed(word: int) -> int:
    """SplitMix64 (Steele et al. 2014): 64 bits of which each depends on all of `word`'s."""
    word = (word + 0x9E3779B97F4A7C15) & _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


class PackedOrder(RowOrder):
    """Rows of tokens that lie ready: pass after pass over all files, each in a permutation of its own.

    vocabulary: rows of the model's embedding. A file's rest, shorter than a row, is left out.
    """

    def __init__(
        self,
        files: Sequence[PackedFile],
        shape: Shape,
        summed: Callable[[np.ndarray], np.ndarray],
        *,
        seed: int,
        vocabulary: int,
    ) -> None:
        counts = [max(len(file.tokens) - 1, 0) // shape.row for file in files]
        self._ends = np.cumsum(counts)
        if not self._ends[-1]:
            raise DataError(f"{files[0].file.path}: no file has the {shape.row + 1} tokens of a row (--max_words).")
        super().__init__(shape, max(int(self._ends[-1]) // shape.global_batch, 1), summed)
        self.files, self.seed, self.vocabulary = files, seed, vocabulary

    @property
    def identity(self) -> dict[str, Any]:
        """The files', and how rows are cut."""
        files = identity_of([file.file for file in self.files])
        return {**files, **self.shape.identity, "tokenizer": self.files[0].tokenizer}

    @property
    def report(self) -> str:
        """Files, tokens and rows."""
        tokens, documents = (
            sum(each) for each in zip(*((len(f.tokens), f.documents) for f in self.files), strict=True)
        )
        number = len(self.files)
        return (
            f"{number:,} file{'s' * (number > 1)} of {tokens:,} tokens in {documents:,} "
            f"document{'s' * (documents > 1)}, {self._ends[-1]:,} rows"
        )

    def rows(self, number: int) -> list[Row]:
        """This rank's rows of a step. Raises `DataError`."""
        return [self._row(number * self.global_batch + own) for own in self.shape.own]

    def _row(self, number: int) -> Row:
        total = int(self._ends[-1])
        done, index = divmod(number, total)
        index = shuffled(index, total, self.seed << 32 | done)
        place = int(np.searchsorted(self._ends, index, side="right"))
        at = (index - (int(self._ends[place - 1]) if place else 0)) * self.shape.row
        file = self.files[place]
        return Row(*file.row(at, self.shape.row + 1, self.vocabulary), (file.file, at))
