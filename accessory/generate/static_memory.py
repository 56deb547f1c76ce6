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
"""The fewest tokens of the cache that attention looks at; longer spans are the powers of two above."""
_SINGLE = 8  # up to so many documents, their number is rounded up to a power of two; above, to a multiple of this


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
        """None: recorded work cannot be copied, so a copied decoder makes its own memory."""

    @staticmethod
    def of(decoder: Decoder, documents: int, longest: int) -> StaticMemory:
        """An empty memory for `documents` documents of up to `longest` tokens; the decoder's last one if that fits."""
        last = decoder.answering
        if last is not None and last._has_room(decoder, documents, longest):
            for layer in last.layers:  # attention multiplies unused places by zero, which leaves a NaN a NaN
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

        user: owns the memory while it is alive, so that an answer asked for meanwhile does not take it.
        """
        self._user = (lambda: None) if user is None else weakref.ref(user)
        beside = (tensor.data_ptr() for layer in self.layers for tensor in layer.beside.values())
        weights = *_places(self.decoder), *beside
        if weights != self._weights:
            self._weights = weights
            self.replays.forget()
            self.chain = chain_for(self.decoder, self.longest)
        self.place(lengths)

    def place(self, lengths: list[int], rows: list[int] | None = None) -> None:
        """These rows, by default the first ones, hold documents of `lengths` tokens.

        The results of other rows are not used: these rows stay at their first token, as the cache may have no room for
        more. Without `rows`, the caches behind the longest length are cleared: attention multiplies what lies there by
        zero, which leaves a NaN a NaN.
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
        """The work that is recorded; it must read nothing from the host."""
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
    """Whether `decoder` answers in fixed places: on a GPU, unless it is being trained, which needs the memory.

    Not if products wait for the GPU, either: trying to record them would leave PyTorch's allocator in disorder.
    """
    asked = not any(parameter.requires_grad or is_sharded(parameter) for parameter in decoder.parameters())
    waits = any(isinstance(module, PackedWeight) and module.waits for module in decoder.modules())
    return asked and not waits and launches_count(decoder.frequencies.device)


def launches_count(device: torch.device) -> bool:
    """Whether launches cost time on `device`: a GPU's kernels wait for them."""
    return device.type == "cuda"


def chain_for(decoder: Decoder, longest: int) -> Chain | None:
    """The decoder's blocks in few launches, or None if it has none; documents have `longest` tokens at most."""
    if why_not(decoder):
        return None
    found = decoding_kernels(decoder.frequencies.device, decoder.dtype)
    return None if found is None else Chain(decoder, longest, *found)


def documents_together(documents: int) -> int:
    """The number of rows that `documents` documents are computed as; rounded up, so that few sizes are recorded."""
    if documents > _SINGLE:
        return -(-documents // _SINGLE) * _SINGLE
    return 1 << (documents - 1).bit_length()


def span_of(tokens: int, longest: int) -> int:
    """How many tokens of a cache of `longest` are looked at for documents of up to `tokens`."""
    return min(max(SHORTEST, 1 << (tokens - 1).bit_length()), longest)


def _places(decoder: Decoder) -> tuple[object, ...]:
    """A value that changes when weights change or move: recorded work reads them in place, or copies made from them.

    What products lay out moves only after `train`, and is held here, so that its address is not used again; what a
    method adds to attention says itself when it moves.
    """
    weights = ((p.data_ptr(), 0 if p.is_inference() else p._version) for p in decoder.parameters())
    packed = (module for module in decoder.modules() if isinstance(module, FewRowsWeight))
    laid_out = (weight.prepared for weight in packed if isinstance(weight.prepared, JoinedMatrices | JoinedGroups))
    additions = (block.attention.addition for _, block in decoder.blocks())
    return *weights, *laid_out, *(None if addition is None else addition.place() for addition in additions)
