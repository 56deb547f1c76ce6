"""Steps of decoding: each gives the host the ids of chosen tokens, and computes the logits of the next ones."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from accessory.generate.logits import next_token_logits
from accessory.generate.static_memory import StaticMemory, documents_together, span_of
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding


class Steps(Protocol):
    """The steps of a batch of B documents; B falls as documents end."""

    def ids(self, tokens: Tensor, more: bool) -> list[int]:
        """The chosen tokens [B] as numbers. more: whether any of the documents may go on."""

    def keep(self, rows: list[int]) -> None:
        """Only these documents go on."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits fp32 [B, V] of what follows `tokens` [B], for documents that go on. Called once after each `ids`."""


class GrowingSteps:
    """Steps whose shapes follow the documents: their number and the length of their cache."""

    def __init__(self, decoder: Decoder, cache: list[LayerCache], lengths: list[int]) -> None:
        self._decoder, self._cache, self._lengths = decoder, cache, lengths

    def ids(self, tokens: Tensor, more: bool) -> list[int]:
        """See `Steps`."""
        return tokens.tolist()

    def keep(self, rows: list[int]) -> None:
        """See `Steps`: the cache of the other documents is not read any more."""
        for layer in self._cache:
            layer.keep(rows, max(self._lengths))
        self._lengths = [self._lengths[row] for row in rows]

    def logits(self, tokens: Tensor) -> Tensor:
        """See `Steps`."""
        ones, starts = (1,) * len(tokens), tuple(self._lengths)
        self._lengths = [length + 1 for length in self._lengths]
        with decoding():
            hidden = self._decoder(tokens, self._decoder.sequences(ones, starts), self._cache)
        return next_token_logits(self._decoder, hidden)


class StaticSteps:
    """Steps in fixed memory; each is launched before the host waits for the tokens of the one before.

    Documents that have ended are still computed, until so few go on that a smaller batch holds them.
    """

    def __init__(self, memory: StaticMemory, lengths: list[int]) -> None:
        self._memory, self._lengths = memory, lengths
        self._together = documents_together(len(lengths))
        self._rows = list(range(len(lengths)))  # where the documents that go on lie
        self._index: Tensor | None = None  # the same on the device; None: they are the first rows
        self._host = _HostCopy(memory.tokens)
        self._next: Tensor | None = None
        memory.begin(lengths, self)

    def ids(self, tokens: Tensor, more: bool) -> list[int]:
        """See `Steps`."""
        self._host.begin(tokens)
        if more:
            held = self._memory.tokens
            if self._index is None:
                held[: len(tokens)].copy_(tokens)
            else:
                held.index_copy_(0, self._index, tokens)
            self._lengths = [length + 1 for length in self._lengths]
            span = span_of(max(self._lengths), self._memory.longest)
            logits = self._memory.step(self._together, span)
            self._next = logits[: len(tokens)] if self._index is None else logits[self._index]
        return self._host.numbers()

    def keep(self, rows: list[int]) -> None:
        """See `Steps`."""
        device = self._memory.tokens.device
        self._next = self._next[torch.tensor(rows, device=device)]
        self._rows, self._lengths = ([old[row] for row in rows] for old in (self._rows, self._lengths))
        if documents_together(len(rows)) < self._together:
            self._move_together()
        else:
            self._index = torch.tensor(self._rows, device=device)
            self._memory.place(self._lengths, self._rows)

    def logits(self, tokens: Tensor) -> Tensor:
        """See `Steps`: `ids` has launched them already."""
        return self._next

    def _move_together(self) -> None:
        for layer in self._memory.layers:
            layer.move_to_front(self._rows, max(self._lengths))
        self._rows, self._index = list(range(len(self._rows))), None
        self._together = documents_together(len(self._rows))
        self._memory.place(self._lengths)


class _HostCopy:
    """Copies numbers to the host while the device goes on."""

    def __init__(self, like: Tensor) -> None:
        """like: a tensor of the shape, dtype and device of the longest copy."""
        self._cuda = like.is_cuda
        self._memory = torch.empty(like.shape, dtype=like.dtype, pin_memory=self._cuda)
        self._copied: torch.cuda.Event | None = None
        self._count = 0

    def begin(self, tensor: Tensor) -> None:
        """Begin to copy a tensor [n]."""
        self._count = len(tensor)
        self._memory[: self._count].copy_(tensor, non_blocking=True)
        if self._cuda:
            self._copied = torch.cuda.current_stream(tensor.device).record_event()

    def numbers(self) -> list[int]:
        """Wait for the copy, and return its numbers."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._memory[: self._count].tolist()
