"""Which rows of tokens make up which step of pretraining: one order, whatever the number of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from accessory.data.batch import IGNORE, Document, PackedBatch
from accessory.data.raw.plan import TextPlan
from accessory.data.raw.skipped import Skipped, place_of
from accessory.data.raw.stream import Position, Row, Stream
from accessory.errors import DataError
from accessory.tokenizer import Tokenizer

_KEPT = 3  # steps whose rows are at hand: what is trained, the one before it, whose report may wait, the next


def documents_of(row: Row, number: int, across: bool) -> list[Document]:
    """The documents of a row, each by itself, or with `across` the whole row as one.

    The row's last token is only a label. Where tokens do not attend across documents, the last one of a document has
    no label: the next document does not follow from it.
    """
    tokens, labels = row.tokens[:-1], row.tokens[1:].astype(np.int64)
    if across:
        return [Document(tokens, labels, number)]
    labels = np.where(row.starts[1:], IGNORE, labels)
    cuts = np.flatnonzero(row.starts[1:-1]) + 1
    parts = zip(np.split(tokens, cuts), np.split(labels, cuts), strict=True)
    return [Document(own, following, number) for own, following in parts]


@dataclass(frozen=True)
class Shape:
    """How rows make up steps. row: tokens of a row. across: whether tokens attend across a row's documents."""

    row: int
    batch_size: int
    accum_iter: int
    dp_rank: int = 0
    dp_size: int = 1
    across: bool = False

    @property
    def global_batch(self) -> int:
        """Rows of a step."""
        return self.batch_size * self.accum_iter * self.dp_size

    @property
    def identity(self) -> dict[str, Any]:
        """How rows are cut from documents, by the names of the flags."""
        return {"max_words": self.row, "attend_across": self.across}

    @property
    def own(self) -> range:
        """Which rows of each step this rank has."""
        return range(self.dp_rank, self.global_batch, self.dp_size)


class RowOrder(ABC):
    """Each step trains on `global_batch` rows of equally many tokens, dealt over ranks and their micro-batches.

    What a row holds depends on its number in the run and on the data alone, so that any number of ranks which divides
    the global batch trains on the same in each step. `summed` adds whole numbers up over data-parallel ranks.
    """

    def __init__(self, shape: Shape, steps_per_epoch: int, summed: Callable[[np.ndarray], np.ndarray]) -> None:
        self.shape, self.steps_per_epoch, self.summed = shape, steps_per_epoch, summed
        self.global_batch = shape.global_batch
        self._supervised: dict[int, int] = {}

    @property
    @abstractmethod
    def report(self) -> str:
        """What is read, for the log."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that determines the rows, as JSON."""

    @abstractmethod
    def rows(self, number: int) -> list[Row]:
        """This rank's rows of step `number` of the run. Raises `DataError`."""

    def state(self, epoch: int, step: int) -> dict[str, np.ndarray]:
        """What has to be saved before this step for a later run to go on with it. A collective."""
        return {}

    def go_on(self, epoch: int, step: int, state: dict[str, np.ndarray] | None) -> None:  # noqa: B027 (a default)
        """Go on with this step, before which `state` was saved; None: begin a pass over the data there."""

    @property
    def most_tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.shape.batch_size * self.shape.row

    def micro_batches(self, epoch: int, step: int) -> Iterator[PackedBatch]:
        """This rank's micro-batches of one step; every rank has as many."""
        number, size = self._number(epoch, step), self.shape.batch_size
        documents = [documents_of(row, number * self.global_batch + own, self.shape.across)
                     for row, own in zip(self.rows(number), self.shape.own, strict=True)]  # fmt: skip
        for first in range(0, len(documents), size):
            yield PackedBatch.pack([document for row in documents[first : first + size] for document in row], False)

    def documents(self, epoch: int, step: int) -> np.ndarray:
        """The numbers of this rank's rows, int64."""
        return self._number(epoch, step) * self.global_batch + np.array(self.shape.own)

    def supervised_tokens(self, epoch: int, step: int) -> int:
        """Labels that count in the global batch. A collective the first time that it is asked for a step."""
        if self.shape.across:
            return self.tokens(epoch, step)
        number = self._number(epoch, step)
        if number not in self._supervised:
            mine = sum(self.shape.row - int(row.starts[1:].sum()) for row in self.rows(number))
            self._supervised = {number: int(self.summed(np.array([mine]))[0]), **self._supervised}
            self._supervised = dict([*self._supervised.items()][:_KEPT])
        return self._supervised[number]

    def loss_weight(self, epoch: int, step: int) -> float:
        """The number of labels that count, by which the sum of losses is divided."""
        return self.supervised_tokens(epoch, step)

    def tokens(self, epoch: int, step: int) -> int:
        """Tokens in the global batch."""
        return self.global_batch * self.shape.row

    def where(self, document: int) -> str:
        """One of this rank's rows as a message names it: its number, and where its first document lies."""
        number, place = divmod(document, self.global_batch)
        row = self.rows(number)[self.shape.own.index(place)]
        return f"{document} ({place_of(*row.origin)})"

    def _number(self, epoch: int, step: int) -> int:
        return epoch * self.steps_per_epoch + step


class TextOrder(RowOrder):
    """Rows of raw text: row i of each step comes from stream i, so that a rank reads nothing but its own streams.

    threads: that encode the next step's rows while a step is computed; with 0 they are encoded when it begins.
    """

    def __init__(
        self,
        plan: TextPlan,
        tokenizer: Tokenizer,
        shape: Shape,
        summed: Callable[[np.ndarray], np.ndarray],
        *,
        window: int,
        threads: int,
        skipped: Skipped,
    ) -> None:
        super().__init__(shape, max(round(plan.tokens / (shape.global_batch * shape.row)), 1), summed)
        self.plan, self.tokenizer, self.window = plan, tokenizer, window
        streams = shape.global_batch
        self._streams = [Stream(plan, tokenizer, own, streams, window, skipped) for own in shape.own]
        self._pool = ThreadPoolExecutor(threads, "reading") if threads else None
        self._taken: dict[int, list[tuple[Position, Row]]] = {}
        self._coming: list[tuple[Position, Future[Row]]] | None = None
        self._next = 0

    @property
    def identity(self) -> dict[str, Any]:
        """The plan's, and how rows are cut."""
        how = {**self.shape.identity, "shuffle_buffer": self.window}
        return {**self.plan.identity, **how, "tokenizer": self.tokenizer.fingerprint}

    @property
    def report(self) -> str:
        """Files and blocks, and about how many tokens they make."""
        plan, number = self.plan, len(self.plan.files)
        return (
            f"{number:,} file{'s' * (number > 1)} of {sum(file.size for file in plan.files):,} bytes in "
            f"{len(plan.blocks):,} blocks, about {plan.tokens:,} tokens{self._few}"
        )

    @property
    def _few(self) -> str:
        """What to say where streams share blocks, in passes that lie apart."""
        if len(self.plan.blocks) >= self.global_batch:
            return ""
        return f"; fewer blocks than the {self.global_batch:,} rows of a step, which so may hold the same documents"

    def rows(self, number: int) -> list[Row]:
        """This rank's rows of a step: the next one, or one of the last few. Raises `DataError`."""
        if number not in self._taken:
            if number != self._next:
                raise AssertionError(f"step {number} is asked for; the next one is {self._next}")
            coming = self._coming or self._ask()
            self._taken[number] = [(position, future.result()) for position, future in coming]
            self._taken.pop(number - _KEPT + 1, None)
            self._next, self._coming = number + 1, None
            if self._pool:
                self._coming = self._ask()
        return [row for _, row in self._taken[number]]

    def state(self, epoch: int, step: int) -> dict[str, np.ndarray]:
        """`streams` int64 [global batch, 4]: the `Position` of each before this step. A collective."""
        number = self._number(epoch, step)
        if number in self._taken:
            mine = [position for position, _ in self._taken[number]]
        elif self._coming:
            mine = [position for position, _ in self._coming]
        else:
            mine = [stream.position for stream in self._streams]
        found = np.zeros((self.global_batch, len(Position._fields)), dtype=np.int64)
        found[list(self.shape.own)] = mine
        return {"streams": self.summed(found)}

    def go_on(self, epoch: int, step: int, state: dict[str, np.ndarray] | None) -> None:
        """Go on with this step. Raises `DataError` for a state of other streams."""
        self._next = self._number(epoch, step)
        positions = self._at_pass(epoch) if state is None else state.get("streams", np.empty(0))
        expected = (self.global_batch, len(Position._fields))
        if positions.shape != expected:
            raise DataError(f"The training state has streams of shape {positions.shape}; expected {expected}.")
        for own, stream in zip(self.shape.own, self._streams, strict=True):
            stream.go_to(Position(*positions[own].tolist()))

    def _at_pass(self, done: int) -> np.ndarray:
        """Where streams stand once so many passes are done: the first block of each that is in the next one."""
        passed = -(-done * len(self.plan.blocks) // self.global_batch) * self.global_batch
        return np.array([Position(passed + n, self.plan.block(passed + n).start) for n in range(self.global_batch)])

    def _ask(self) -> list[tuple[Position, Future[Row]]]:
        """Have the next row of each own stream encoded; where it begins is known before, whatever is met then."""
        positions = [stream.position for stream in self._streams]
        if self._pool:
            rows = [self._pool.submit(stream.take, self.shape.row) for stream in self._streams]
        else:
            rows = [_done(stream.take(self.shape.row)) for stream in self._streams]
        return [*zip(positions, rows, strict=True)]


def _done(row: Row) -> Future[Row]:
    future: Future[Row] = Future()
    future.set_result(row)
    return future
