"""Which documents make up which step: one global order, whatever the number of ranks."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import numpy as np

from accessory.data.batch import IGNORE, Document, PackedBatch
from accessory.data.corpus import Corpus
from accessory.data.pictures import Picture, draw_of
from accessory.errors import ConfigError

_SORTED_TOGETHER = 50
"""Global batches whose documents are sorted together: few enough for each epoch to have other steps."""


class Order(Protocol):
    """Which documents make up which step: what the engine asks of any of them. Steps count from 0 within an epoch."""

    global_batch: int
    """Documents of a step, over all ranks."""
    steps_per_epoch: int

    @property
    def most_tokens(self) -> int:
        """The most tokens a micro-batch can have."""

    def micro_batches(self, epoch: int, step: int) -> Iterator[PackedBatch]:
        """This rank's micro-batches of one step; every rank has as many."""

    def documents(self, epoch: int, step: int) -> np.ndarray:
        """This rank's documents of one step, int64."""

    def supervised_tokens(self, epoch: int, step: int) -> int:
        """Labels that count in the global batch."""

    def loss_weight(self, epoch: int, step: int) -> float:
        """The sum of the weights of all labels in the global batch, by which the sum of losses is divided."""

    def tokens(self, epoch: int, step: int) -> int:
        """Tokens in the global batch."""

    def state(self, epoch: int, step: int) -> dict[str, np.ndarray]:
        """What has to be saved before this step for a later run to go on with it, by name. A collective."""

    def where(self, document: int) -> str:
        """One of this rank's documents as a message names it: its number, file and line."""


class GlobalOrder:
    """Cuts each epoch's permutation of the corpus into global batches and deals each over ranks and micro-batches.

    The permutation depends on (seed, epoch) alone and a step's documents on the size of the global batch alone. So any
    number of data-parallel ranks that divides the global batch trains on the same documents in each step, and any step
    can be made without those before it. An epoch's last batch may be short; nothing is dropped.

    With `max_tokens`, a micro-batch holds documents of at most that many tokens together instead of `batch_size` ones.
    Global batches stay the same; the number of their micro-batches then differs from step to step.
    With `group_by_length`, documents of a global batch have about the same length, in true tokens.
    With `prompt_weight`, tokens that are not to be learned get labels of that weight, and learned ones of weight 1.
    With `share_prefixes`, a prefix that documents of a micro-batch share is packed once (see `PackedBatch`).
    `ids` int64 are the documents of the corpus that take part; None: all of them.

    If it `trains`, one step follows another, and images are cropped at random in each epoch anew, if the corpus says
    so. So many `threads` read images ahead: of the next micro-batch, and of the next step; with 0 they are read when
    their pixels are asked for.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        batch_size: int,
        accum_iter: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        max_tokens: int | None = None,
        group_by_length: bool = False,
        share_prefixes: bool = True,
        ids: np.ndarray | None = None,
        prompt_weight: float = 0.0,
        trains: bool = True,
        threads: int = 0,
    ) -> None:
        self.ids = np.arange(len(corpus)) if ids is None else ids
        at = self.ids[corpus.lengths[self.ids].argmax()]
        longest = int(corpus.lengths[at])
        if max_tokens is not None and longest > max_tokens:
            # Trained on alone, it would take more memory than the user allowed, perhaps hours into the run.
            raise ConfigError(
                f"--max_tokens {max_tokens}: document {at}, the longest, has {longest} "
                f"tokens. Give --max_tokens {longest} or more, or cut documents with --max_words {max_tokens}."
            )
        self.corpus, self.batch_size, self.dp_rank, self.dp_size = corpus, batch_size, dp_rank, dp_size
        self.seed, self.shuffle, self.max_tokens = seed, shuffle, max_tokens
        self.share_prefixes, self.prompt_weight = share_prefixes, prompt_weight
        self.group_by_length, self.trains = group_by_length, trains
        self._readers = ThreadPoolExecutor(threads) if threads and corpus.pictures else None
        self._next: tuple[tuple[int, int], list[PackedBatch]] | None = None  # a step that was made ahead
        self.global_batch = batch_size * accum_iter * dp_size
        self.steps_per_epoch = -(-len(self.ids) // self.global_batch)
        self._cached: tuple[int, np.ndarray] | None = None

    def global_ids(self, epoch: int, step: int) -> np.ndarray:
        """Documents of one global batch, in the order of the epoch. Raises IndexError for a step beyond the epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"step {step} is not among the {self.steps_per_epoch} of an epoch")
        start = step * self.global_batch
        return self._permutation(epoch)[start : start + self.global_batch]

    def micro_batches(self, epoch: int, step: int) -> Iterator[PackedBatch]:
        """This rank's micro-batches of one step; every rank has as many."""
        at, last = (epoch, step), step + 1 == self.steps_per_epoch
        ready = self._next[1] if self._next and self._next[0] == at else self._made(*at)
        yield from ready
        following = (epoch + 1, 0) if last else (epoch, step + 1)
        if self._readers and self.trains and not (self._next and self._next[0] == following):
            self._next = following, list(self._made(*following))

    def _made(self, epoch: int, step: int) -> Iterator[PackedBatch]:
        """A step's micro-batches, each made before the one ahead of it is used, so that its images are read then."""
        slots = self._deal(self.global_ids(epoch, step))[self.dp_rank :: self.dp_size]
        made = self._begun(self._packed(slots[0], epoch))
        for ids in slots[1:]:
            before, made = made, self._begun(self._packed(ids, epoch))
            yield before
        yield made

    def documents(self, epoch: int, step: int) -> np.ndarray:
        """This rank's documents of one step."""
        return np.concatenate(self._deal(self.global_ids(epoch, step))[self.dp_rank :: self.dp_size])

    def supervised_tokens(self, epoch: int, step: int) -> int:
        """Labels that count in the global batch; known on every rank without asking the others."""
        return int(self.corpus.supervised[self.global_ids(epoch, step)].sum())

    def loss_weight(self, epoch: int, step: int) -> float:
        """The sum of the weights of all labels in the global batch, by which the sum of losses is divided."""
        supervised = self.supervised_tokens(epoch, step)
        if not self.prompt_weight:
            return supervised
        ids = self.global_ids(epoch, step)
        return supervised + self.prompt_weight * (int(self.corpus.labelable[ids].sum()) - supervised)

    def state(self, epoch: int, step: int) -> dict[str, np.ndarray]:
        """Nothing: epoch and step say it all."""
        return {}

    def where(self, document: int) -> str:
        """A document as a message names it: its number, file and line."""
        return self.corpus.where(document)

    def tokens(self, epoch: int, step: int) -> int:
        """Tokens in the global batch."""
        return int(self.corpus.lengths[self.global_ids(epoch, step)].sum())

    def packed_tokens(self, epoch: int, step: int) -> int:
        """Tokens that all ranks compute in the step; shared prefixes count once, tokens of idle ranks count too."""
        return sum(len(self._packed(ids, epoch).tokens) for ids in self._deal(self.global_ids(epoch, step)))

    @property
    def most_tokens(self) -> int:
        """The most tokens a micro-batch can have: those of the longest documents it may hold, at most `max_tokens`."""
        documents = self.batch_size if self.max_tokens is None else self.global_batch
        together = int(np.sort(self.corpus.lengths[self.ids])[-documents:].sum())
        return together if self.max_tokens is None else min(together, self.max_tokens)

    def _packed(self, ids: np.ndarray, epoch: int) -> PackedBatch:
        if len(ids) == 0:
            return PackedBatch.idle(int(self.corpus.tokens[0]))
        return PackedBatch.pack([self._document(i, epoch) for i in ids], self.share_prefixes)

    def _begun(self, batch: PackedBatch) -> PackedBatch:
        """The batch, whose pictures are now read by threads, each once."""
        if not self._readers or not batch.insets:
            return batch
        begun: dict[Picture, Picture] = {}
        for inset in batch.insets:
            if inset.content not in begun:
                begun[inset.content] = inset.content.begun(self._readers)
        return replace(batch, insets=tuple(replace(inset, content=begun[inset.content]) for inset in batch.insets))

    def _document(self, index: int, epoch: int) -> Document:
        tokens, labels = self.corpus.document(index)
        drawn = self.trains and self.corpus.pictures
        insets = self.corpus.insets(index, draw_of(self.seed, epoch, index) if drawn else None)
        if not self.prompt_weight:
            return Document(tokens, labels, index, insets)
        learned, following = labels >= 0, np.append(tokens[1:], IGNORE)
        for inset in insets:  # its rows are not predicted, nor is a document's first token by rows before it
            following[max(inset.start - 1, 0) : inset.start + inset.rows - (inset.start > 0)] = IGNORE
        weights = np.where(learned, 1, np.where(following >= 0, self.prompt_weight, 0)).astype(np.float32)
        labels, answers = np.where(learned, labels, following), learned.astype(np.float32)
        return Document(tokens, labels, index, insets, weights, answers)

    def _deal(self, ids: np.ndarray) -> list[np.ndarray]:
        """Documents of each micro-batch; micro-batch m of rank r is slot m * dp_size + r.

        Documents are dealt longest first, forwards over the slots and then backwards, so that ranks, which wait for
        each other, get about equally many tokens.
        """
        if self.max_tokens is not None:
            return self._deal_tokens(ids)
        rounds = -(-len(ids) // (self.batch_size * self.dp_size))
        count = rounds * self.dp_size
        if not self.shuffle:
            return np.array_split(ids, count)
        by_length = ids[np.argsort(-self.corpus.lengths[ids], kind="stable")]
        place = np.arange(len(ids)) % (2 * count)
        slot = np.where(place < count, place, 2 * count - 1 - place)
        return [by_length[slot == i] for i in range(count)]

    def _deal_tokens(self, ids: np.ndarray) -> list[np.ndarray]:
        """`_deal` into the fewest micro-batches a rank that hold no more than `max_tokens` each.

        Longest first, each to the slot with the fewest tokens so far (Graham 1969, longest processing time): at worst
        4/3 of the best. Slots are then sorted by their tokens, so that those of one micro-batch are about equal.
        """
        lengths = self.corpus.lengths[ids]
        by_length = np.argsort(-lengths, kind="stable")
        rounds = -(-int(lengths.sum()) // (self.max_tokens * self.dp_size))
        while True:  # ends at the latest with a slot for each document
            loads = [(0, slot) for slot in range(rounds * self.dp_size)]
            slots: list[list[int]] = [[] for _ in loads]
            for place in by_length:
                load, slot = loads[0]
                heapq.heapreplace(loads, (load + int(lengths[place]), slot))
                slots[slot].append(place)
            if max(loads)[0] <= self.max_tokens:
                fullest_first = sorted(loads, key=lambda entry: (-entry[0], entry[1]))
                return [ids[slots[slot]] for _, slot in fullest_first]
            rounds += 1

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return self.ids
        if self._cached is None or self._cached[0] != epoch:
            generator = np.random.default_rng(np.random.SeedSequence([self.seed, epoch]))
            order = self.ids[generator.permutation(len(self.ids))]
            self._cached = epoch, self._grouped(order, generator) if self.group_by_length else order
        return self._cached[1]

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """`order` sorted by length within every `_SORTED_TOGETHER` global batches, the whole batches then shuffled.

        Without that second shuffle the loss would rise and fall with the lengths. The last, short batch stays last.
        """
        size = _SORTED_TOGETHER * self.global_batch
        parts = [order[begin : begin + size] for begin in range(0, len(order), size)]
        by_length = np.concatenate([part[np.argsort(-self.corpus.lengths[part], kind="stable")] for part in parts])
        whole = len(order) // self.global_batch * self.global_batch
        batches = by_length[:whole].reshape(-1, self.global_batch)
        return np.concatenate([generator.permutation(batches).reshape(-1), by_length[whole:]])
