"""Decoding in fixed places: the same work in the same shapes for every token, recorded once and then replayed.

A token of a small batch takes less time to compute than its hundreds of kernels take to launch. A GPU can replay
recorded launches by itself, if all of them read and write where they did before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from accessory.generate.logits import next_token_logits
from accessory.generate.replays import Replays, recorder_for
from accessory.kernels import decoding_kernels
from accessory.kernels.decoding import MOST_ROWS
from accessory.kernels.few_rows import JoinedGroups, JoinedMatrices
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder
from accessory.model.decoding import decoding
from accessory.model.decoding_chain import Chain, why_not
from accessory.parallel.data import is_sharded
from accessory.quant import PackedWeight
from accessory.quant.few_rows import FewRowsWeight

SHORTEST = 256
"""Tokens of the cache that attention looks at, at least; the next ones are its powers of two."""
_SINGLE = 8  # documents up to which powers of two are computed together, and from which multiples


class StaticMemory:
    """The cache of up to `rows` documents, and what a step reads: a token for each, and its position."""

    def __init__(self, decoder: Decoder, layers: list[LayerCache]) -> None:
        self.decoder, self.layers = decoder, layers
        self.rows, self.longest = layers[0].keys.shape[:2]
        device = layers[0].keys.device
        self.tokens, self.positions, self.steps = torch.zeros(3, self.rows, dtype=torch.int64, device=device).unbind()
        self.replays, self.chain = Replays(recorder_for(device, decoder.ranks)), None
        self._weights: tuple[object, ...] = ()
        self._user: Callable[[], object] = lambda: None

    def __deepcopy__(self, _memo: dict) -> None:
        """A copied decoder makes its own: recorded work cannot be copied."""

    @staticmethod
    def of(decoder: Decoder, documents: int, longest: int) -> StaticMemory:
        """Empty, for `documents` documents of up to `longest` tokens: the decoder's last one where that has room."""
        last = decoder.answering
        if last is not None and last._has_room(decoder, documents, longest):
            for layer in last.layers:  # whatever is there, even what is not a number, is multiplied by zero
                layer.keys.zero_()
                layer.values.zero_()
            return last
        decoder.answering = None  # before the new one is made: there may not be room for both
        rooms = documents_together(documents), -(-longest // SHORTEST) * SHORTEST
        decoder.answering = StaticMemory(decoder, decoder.new_cache(*rooms))
        return decoder.answering

    def _has_room(self, decoder: Decoder, documents: int, longest: int) -> bool:
        idle = self._user() is None and self.decoder is decoder
        return idle and documents <= self.rows and longest <= self.longest

    def begin(self, lengths: list[int], user: object = None) -> None:
        """The cache's first rows hold documents of `lengths` tokens. What was recorded of other weights is dropped.

        user: whose they are, as long as it is alive: answers may be asked for while others are being given.
        """
        self._user = (lambda: None) if user is None else weakref.ref(user)
        weights = _places(self.decoder)
        if weights != self._weights:
            self._weights = weights
            self.replays.forget()
            self.chain = chain_for(self.decoder, self.longest)
        self.place(lengths)

    def place(self, lengths: list[int], rows: list[int] | None = None) -> None:
        """These rows, by default the first ones, hold documents of `lengths` tokens.

        Nothing of the others is asked: they stay at their first token, since the cache need not have room for more.
        What the first rows held behind, which may be no numbers and is multiplied by zero, is dropped.
        """
        for layer in self.layers if rows is None else ():
            layer.keys[: len(lengths), max(lengths) :] = 0
            layer.values[: len(lengths), max(lengths) :] = 0
        positions, steps = torch.zeros(2, self.rows, dtype=torch.int64)
        at = torch.arange(len(lengths)) if rows is None else torch.tensor(rows)
        positions[at], steps[at] = torch.tensor(lengths), 1
        self.positions.copy_(positions)
        self.steps.copy_(steps)

    def step(self, rows: int, span: int) -> Tensor:
        """Compute the tokens of the first `rows` documents at their positions, which then move on; logits [rows, V].

        span: how many tokens of the cache are looked at. The result is overwritten by the next step.
        """
        return self.replays.run((rows, span), lambda: self.forward(rows, span))

    def forward(self, rows: int, span: int) -> Tensor:
        """What is recorded: it reads nothing from the host."""
        part = [layer.documents(0, rows) for layer in self.layers]
        tokens, positions = self.tokens[:rows], self.positions[:rows]
        with decoding():
            if self.chain is not None and rows <= MOST_ROWS:
                hidden = self.chain.forward(tokens, positions, part, span)
            else:
                hidden = self.decoder(tokens, self.decoder.next_tokens(positions, span), part)
            logits = next_token_logits(self.decoder, hidden)
        self.positions.add_(self.steps)
        return logits


def is_static(decoder: Decoder) -> bool:
    """Whether it answers in fixed places: on a GPU, unless it is trained, when memory is spoken for.

    Nor where products wait for the GPU: an attempt to record them would leave PyTorch's allocator in disorder.
    """
    asked = not any(parameter.requires_grad or is_sharded(parameter) for parameter in decoder.parameters())
    waits = any(isinstance(module, PackedWeight) and module.waits for module in decoder.modules())
    return asked and not waits and launches_count(decoder.frequencies.device)


def launches_count(device: torch.device) -> bool:
    """Whether kernels wait for their launches there."""
    return device.type == "cuda"


def chain_for(decoder: Decoder, longest: int) -> Chain | None:
    """The decoder's blocks in few launches, where that can be; documents have `longest` tokens at most."""
    if why_not(decoder):
        return None
    found = decoding_kernels(decoder.frequencies.device, decoder.dtype)
    return None if found is None else Chain(decoder, longest, *found)


def documents_together(documents: int) -> int:
    """As how many documents so many are computed."""
    if documents > _SINGLE:
        return -(-documents // _SINGLE) * _SINGLE
    return 1 << (documents - 1).bit_length()


def span_of(tokens: int, longest: int) -> int:
    """How many tokens of a cache of `longest` are looked at for documents of up to `tokens`."""
    return min(max(SHORTEST, 1 << (tokens - 1).bit_length()), longest)


def _places(decoder: Decoder) -> tuple[object, ...]:
    """Which weights they are, and where: what is recorded reads them there, and what is laid out is computed from them.

    What a method prepares lies elsewhere every time; what products lay out, after `train`, and not before this is
    dropped.
    """
    weights = ((p.data_ptr(), 0 if p.is_inference() else p._version) for p in decoder.parameters())
    packed = (module for module in decoder.modules() if isinstance(module, FewRowsWeight))
    laid_out = (weight.prepared for weight in packed if isinstance(weight.prepared, JoinedMatrices | JoinedGroups))
    prepared = any(block.attention.addition is not None for _, block in decoder.blocks())
    return *weights, *laid_out, object() if prepared else None
