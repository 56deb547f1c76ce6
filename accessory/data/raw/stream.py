"""One of a run's streams: an endless row of tokens, of which each step takes as many, and which goes on anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from accessory.data.raw.documents import Piece
from accessory.data.raw.encoding import encoded_parts
from accessory.data.raw.files import RawFile
from accessory.data.raw.plan import TextPlan
from accessory.data.raw.skipped import Skipped
from accessory.tokenizer import Tokenizer


class Row(NamedTuple):
    """tokens: int32 [S + 1], the last of which is only predicted. starts: bool [S + 1], where a document begins.

    origin: the file, and the place in it where the row's first document begins.
    """

    tokens: np.ndarray
    starts: np.ndarray
    origin: tuple[RawFile, int]


class Position(NamedTuple):
    """Where a stream stands: in the window that begins in `block` at `offset`, at a `token` of one `document` of it."""

    block: int
    offset: int
    document: int = 0
    token: int = 0


class _Held(NamedTuple):
    """Tokens of one document that are not taken yet. at: where the first of them is."""

    tokens: np.ndarray
    begins: bool
    at: Position
    origin: tuple[RawFile, int]


class Stream:
    """Stream `number` of `streams`: of the plan's endless sequence of blocks it gets each `streams`th one.

    Documents of about `window` bytes are read at a time, and shuffled among each other; no more are held as text. What
    it gives depends on the plan, its number and its position alone.
    """

    def __init__(
        self, plan: TextPlan, tokenizer: Tokenizer, number: int, streams: int, window: int, skipped: Skipped
    ) -> None:
        self.plan, self.tokenizer, self.number, self.streams = plan, tokenizer, number, streams
        self.window, self.skipped = window, skipped
        self.go_to(Position(number, plan.block(number).start))

    def go_to(self, position: Position) -> None:
        """Go on from `position`, which an earlier `position` of the stream was."""
        self._next, self._reader = (position.block, position.offset), None
        self._held: deque[_Held] = deque()
        self._coming = self._encoded(position.document)
        left = position.token
        while left:
            self._hold()
            dropped = min(left, len(self._held[0].tokens))
            self._drop(dropped)
            left -= dropped

    @property
    def position(self) -> Position:
        """Where the first token is that was not taken yet."""
        if not self._held:
            self._hold()
        return self._held[0].at

    def take(self, count: int) -> Row:
        """The next `count` tokens, and one more that stays to be taken."""
        there = sum(len(held.tokens) for held in self._held)
        while there <= count:
            self._hold()
            there += len(self._held[-1].tokens)
        tokens, starts = np.empty(count + 1, dtype=np.int32), np.zeros(count + 1, dtype=bool)
        origin, filled = self._held[0].origin, 0
        for held in self._held:
            part = held.tokens[: count + 1 - filled]
            if not len(part):
                break
            tokens[filled : filled + len(part)], starts[filled] = part, held.begins
            filled += len(part)
        self._drop(count)
        return Row(tokens, starts, origin)

    def _drop(self, count: int) -> None:
        while count:
            held = self._held.popleft()
            if count < len(held.tokens):
                at = held.at._replace(token=held.at.token + count)
                self._held.appendleft(held._replace(tokens=held.tokens[count:], begins=False, at=at))
                return
            count -= len(held.tokens)

    def _hold(self) -> None:
        """Encode a document more, or a part of a long one."""
        self._held.append(next(self._coming))

    def _encoded(self, skip: int) -> Iterator[_Held]:
        """The tokens of all documents to come but the first `skip` of the next window, without an end."""
        while True:
            for file, piece, at in self._window(skip):
                count = 0
                for part in encoded_parts(piece, self.tokenizer):
                    if len(part):
                        yield _Held(part, count == 0, at._replace(token=count), (file, piece.at))
                    count += len(part)
            skip = 0

    def _window(self, skip: int) -> Iterator[tuple[RawFile, Piece, Position]]:
        """The documents of the next window, shuffled, without the first `skip`."""
        block, offset = self._next
        pieces = self._read()
        order = np.random.default_rng(np.random.SeedSequence([self.plan.seed, self.number, block, offset]))
        for place, index in enumerate(order.permutation(len(pieces)).tolist()):
            file, piece = pieces[index]
            pieces[index] = None  # its text is not needed any more
            if place >= skip:
                yield file, piece, Position(block, offset, place)

    def _read(self) -> list[tuple[RawFile, Piece]]:
        """The documents of the next window, as they lie in the files.

        It ends where a pass over the blocks does, and with any block of which it is half full: a file that need not be
        read on from its midst takes no memory. Raises `DataError`.
        """
        (block, offset), found, size = self._next, [], 0
        done, exhausted = block // len(self.plan.blocks), True
        while exhausted and (not found or (2 * size < self.window and block // len(self.plan.blocks) == done)):
            file, _, stop = self.plan.block(block)
            if self._reader is None:
                file.check_size()
                self._reader = self.plan.reader.read(file, offset, stop)
            pieces: list[Piece] = []
            for piece in self._reader:
                pieces.append(piece)
                size, offset = size + len(piece.text or ""), piece.after
                if size >= self.window:
                    exhausted = offset == stop
                    break
            if exhausted:
                block, self._reader = block + self.streams, None
                offset = self.plan.block(block).start
            self.skipped.count(file, pieces)
            found += [(file, piece) for piece in pieces if piece.text]
        self._next = block, offset
        return found
