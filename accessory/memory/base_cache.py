"""What a frozen base computes, kept on disk: from the second epoch on a side network is trained without running it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from accessory.data.batch import PackedBatch
from accessory.errors import ConfigError
from accessory.memory.row_file import ROWS, Exact, RowFile, Span
from accessory.method.side_network import SideDecoder
from accessory.model.sequences import Sequences
from accessory.parallel.agree import highest, together
from accessory.parallel.groups import Layout


def states_of(decoder: SideDecoder, rows: str) -> list[Exact]:
    """How the rows of each state that is read are packed; the last one, which the base's head continues, is exact."""
    found = []
    for place in decoder.read:
        width = decoder.as_read(place, torch.empty(1, decoder.args.dim, device="meta")).shape[1]
        kind = Exact if place == decoder.read[-1] else ROWS[rows]
        found.append(kind(width, decoder.dtype))
    return found


class BaseCache:
    """Takes a batch's base states from `file` if it has all its documents, else computes and writes them.

    What is read is the same in both cases: rows in 8 bits are rounded in the first epoch too.
    """

    def __init__(self, file: RowFile, layout: Layout, data_parallel: str) -> None:
        self.file, self.device, self.writes = file, layout.device, layout.mp_rank == 0
        # Ranks that compute a block together must agree whether they do.
        self.agrees = layout.mp_size > 1 or (data_parallel == "fsdp" and layout.dp_size > 1)
        self.reader = ThreadPoolExecutor(1)

    def hidden(self, decoder: SideDecoder, batch: PackedBatch, sequences: Sequences) -> Tensor:
        """As the decoder's forward: the head's input [T, embedding_dim]. Raises `ConfigError` for a batch with insets.

        A collective where ranks compute blocks together.
        """
        if batch.insets:
            raise ConfigError("--cache_base: a document has insets; only documents of tokens alone can be cached.")
        with torch.no_grad():
            entered = decoder.enter(batch.tokens, sequences)
        states = self._read(decoder, batch) if self._has(batch) else self._computed(decoder, batch, entered, sequences)
        return decoder.beside(entered, states, sequences)

    def expect(self, documents: Iterable[int]) -> None:
        """These come next: have their rows read ahead, by another thread."""
        self.reader.submit(self.file.will_need, [document for document in documents if self.file.written[document]])

    def settle(self) -> None:
        """What was written is there for all ranks, and whatever happens. A collective. Raises `DiskFullError`."""
        together(self.file.settle)
        together(self.file.refresh)

    def close(self) -> None:
        """End the thread."""
        self.reader.shutdown()

    def _has(self, batch: PackedBatch) -> bool:
        missing = not self.file.has(batch.sample_ids)
        return not (highest([int(missing)])[0] if self.agrees else missing)

    def _read(self, decoder: SideDecoder, batch: PackedBatch) -> Iterator[tuple[int, Tensor]]:
        spans = [
            Span(document, known, length - known)
            for document, length, known in zip(batch.sample_ids, batch.lengths, batch.shared, strict=False)
        ]
        for number, place in enumerate(decoder.read):
            # A rank without documents has one token that nothing is learned from.
            rows = self.file.read(number, spans) if spans else torch.zeros(1, self.file.states[number].width)
            yield place, rows.to(self.device, decoder.dtype, non_blocking=True)

    def _computed(self, decoder: SideDecoder, batch: PackedBatch, *given) -> Iterator[tuple[int, Tensor]]:
        documents = zip(batch.sample_ids, rows_of_documents(batch), strict=False)
        new = {document: rows for document, rows in documents if self.writes and not self.file.written[document]}
        numbers = {place: number for number, place in enumerate(decoder.read)}
        for place, state in enumerate(decoder.states(*given)):
            if place not in numbers:
                continue
            kind = self.file.states[numbers[place]]
            with torch.no_grad():
                packed = kind.pack(decoder.as_read(place, state))
                if new:
                    self._write(numbers[place], new, packed)
            yield place, kind.unpack(packed)
        self.file.add(new)

    def _write(self, number: int, new: dict[int, Tensor], packed: Tensor) -> None:
        packed = packed.to("cpu")
        for document, rows in new.items():
            self.file.write(number, document, packed[rows])


def rows_of_documents(batch: PackedBatch) -> list[Tensor]:
    """For each document, where the rows of its tokens lie among the batch's T; those of a shared prefix lie earlier."""
    found, end, before = [], 0, torch.empty(0, dtype=torch.int64)
    for length, known in zip(batch.lengths, batch.shared, strict=True):
        own = torch.arange(end, end + length - known)
        before, end = torch.cat([before[:known], own]), end + length - known
        found.append(before)
    return found
