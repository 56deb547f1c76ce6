"""The key/value cache of one document that goes on from one answer to the next."""

from __future__ import annotations

from accessory.generate.static_memory import StaticMemory
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder

_GROWTH = 256  # tokens by which a kept cache grows, at least


class KeptCache:
    """The keys and values of one document, kept from one answer to the next; `tokens` are the tokens they belong to."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.layers: list[LayerCache] = []
        self._decoder: Decoder | None = None
        self._picture: int | None = None
        self._static: StaticMemory | None = None

    def begin(self, decoder: Decoder, ids: list[int], longest: int, picture: int | None = None) -> int:
        """Keep the tokens that `ids` begin with, and make room for `longest`; returns how many of `ids` are cached.

        The last one never counts, since its output is wanted. If the decoder is another one, nothing is kept; nor if
        the picture is, whose key is given where it stands beside the tokens.
        """
        if decoder is not self._decoder:
            self.tokens, self.layers, self._decoder, self._static = [], [], decoder, None
        if picture != self._picture:
            self.tokens, self._picture = [], picture
        known = 0
        while known < min(len(self.tokens), len(ids) - 1) and self.tokens[known] == ids[known]:
            known += 1
        del self.tokens[known:]
        if not self.layers:
            self.layers = decoder.new_cache(1, longest)
        elif (room := self.layers[0].keys.shape[1]) < longest:
            self._static = None
            for layer in self.layers:
                layer.grow(max(longest, room + _GROWTH), known)
        return known

    def static(self) -> StaticMemory:
        """What steps in fixed places need beside the cache; made at first use, and again when the cache has grown."""
        if self._static is None:
            self._static = StaticMemory(self._decoder, self.layers)
        return self._static
