"""The decoder of side tuning: a narrow network beside a base (QST, Zhang et al. 2024, section 3), a tail, or both.

The base's blocks before the tail are only run forward. Each output is read by a side block as it appears, and then
dropped; no gradient goes through these blocks, and nothing of them is kept but what a downsample needs for its own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from accessory.data.batch import IGNORE
from accessory.method.downsample import Downsample, make_downsample
from accessory.method.side_settings import SideSettings, side_args
from accessory.model.args import ModelArgs
from accessory.model.block import Block
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder, Projection
from accessory.model.norm import make_norm
from accessory.model.position import rotary_frequencies, rotations_at
from accessory.model.sequences import Sequences


class Gate(nn.Module):
    """A learned weight for each channel, or one for all of them, fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=torch.float32, device="meta"))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        """(1 - sigmoid(weight)) one + sigmoid(weight) other, both [T, D] -> [T, D]."""
        return torch.lerp(one, other, torch.sigmoid(self.weight).to(one.dtype))


class SideDecoder(Decoder):
    """The base, and beside it a side block for each `side_layers`-th of its blocks.

    Before side block i: side = (1 - sigmoid(z_i)) downsample_i(state) + sigmoid(z_i) side, the first time with the
    downsampled embedding on the right. After the last: u = upsample(norm(side)). It is mixed with the base's final
    state h: h + gate * u for a start at the base, else sigmoid(gate) h + (1 - sigmoid(gate)) u.
    With a `tail` of n blocks, h is the input of the base's last n blocks, which have LoRA and belong to the side
    network: gradients go back through them, by default for tokens with a label, and no further.
    """

    def __init__(self, args: ModelArgs, settings: SideSettings, **how: Any) -> None:
        super().__init__(args, **how)
        self.settings = settings
        self.frozen_layers = args.n_layers - settings.tail_of(args.n_layers)
        for block in self.layers[self.frozen_layers :]:
            block.only_labelled = settings.tail_backward == "labelled"
            for linear in (*chain(*block.attention.linears_by_input()), *chain(*block.feed_forward.linears_by_input())):
                linear.add_lora(settings.tail_rank, 1.0, 0.0)
        self.side = nn.ModuleList()
        if settings.side_layers:
            self._make_side(args.dim if settings.tail else args.embedding_dim)

    def _make_side(self, mixed: int) -> None:
        """The side network, whose result is added to a state [T, mixed]."""
        settings, wide = self.settings, self.args.dim
        self.side_args = narrow = side_args(self.args, settings)
        width, count, vectors = narrow.dim, narrow.n_layers, settings.gate == "vector"
        self.side.extend(Block(narrow, i, self.ranks, dtype=torch.float32) for i in range(count))
        self.downsample = nn.ModuleList(make_downsample(wide, width, settings) for _ in range(count))
        own = settings.embedding_downsample == "own"
        self.embedding_downsample: Downsample | None = make_downsample(wide, width, settings) if own else None
        self.gates = nn.ModuleList(Gate(width if vectors else 1) for _ in range(count))
        self.side_norm = make_norm(narrow, width)
        self.upsample = Projection(width, mixed, torch.float32, bias=True)
        self.final_gate = Gate(mixed if vectors else 1)
        self.register_buffer("side_frequencies", rotary_frequencies(narrow), persistent=False)

    def forward(self, inputs: Tensor, sequences: Sequences, cache: list[LayerCache] | None = None) -> Tensor:
        """As `Decoder.forward`."""
        with torch.no_grad():
            entered = self.enter(inputs, sequences)
        return self.beside(entered, enumerate(self.states(entered, sequences, cache)), sequences, cache)

    @torch.no_grad()
    def states(self, x: Tensor, sequences: Sequences, cache: list[LayerCache] | None = None) -> Iterator[Tensor]:
        """Of the blocks before the tail, without gradients."""
        yield from islice(super().states(x, sequences, cache), self.frozen_layers)

    def beside(
        self,
        entered: Tensor,
        states: Iterator[tuple[int, Tensor]],
        sequences: Sequences,
        cache: list[LayerCache] | None = None,
    ) -> Tensor:
        """The base's first input [T, D] and states (number of the block, its output [T, D]), those of `read` or more
        -> the head's input [T, embedding_dim]. A state may be given `as_read`.
        """
        state = entered
        if not self.side:
            ((_, state),) = deque(states, maxlen=1) or ((0, state),)
            return self._through_tail(state, sequences, cache)
        side, mine = (self.embedding_downsample or self.downsample[0])(entered), self._side_sequences(sequences)
        for place, state in states:
            if (i := self.reader(place)) is not None:
                side = self.gates[i](self.downsample[i](state), side)
                side = self.side[i](side, mine, cache[len(self.layers) + i] if cache else None)
        up = self.upsample(self.side_norm(side))
        if self.settings.tail:
            return self._through_tail(state + self.final_gate.weight.to(up.dtype) * up, sequences, cache)
        with torch.no_grad():
            last = self.leave(state)
        if self.settings.start == "released":
            return self.final_gate(up, last)
        return last + self.final_gate.weight.to(up.dtype) * up

    def _through_tail(self, x: Tensor, sequences: Sequences, cache: list[LayerCache] | None) -> Tensor:
        for i, block in enumerate(self.layers[self.frozen_layers :], self.frozen_layers):
            x = block(x, sequences, cache[i] if cache else None)
        return self.leave(x)

    def learned(self, labels: Tensor, weights: Tensor | None, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """While training, the device's generator draws a share of them; as weights rise, the mean gradient stays."""
        count = math.ceil(len(rows) * self.settings.label_share) if self.training else len(rows)
        if count == len(rows):
            return labels, weights, rows
        drawn = rows[torch.randperm(len(rows), device=rows.device)[:count]]
        weights = torch.ones_like(labels, dtype=torch.float32) if weights is None else weights
        chosen = torch.full_like(labels, IGNORE).index_copy(0, drawn, labels[drawn])
        return chosen, weights * (len(rows) / count), drawn.sort().values

    def reader(self, place: int) -> int | None:
        """Number of the side block that reads the output of the base's block `place`; None where none does.

        They are counted from the last before the tail, which is always read.
        """
        if not self.side or place >= self.frozen_layers:
            return None
        behind, rest = divmod(self.frozen_layers - 1 - place, self.settings.side_layers)
        return None if rest else len(self.side) - 1 - behind

    @property
    def read(self) -> tuple[int, ...]:
        """The base's blocks whose outputs are read: by a side block, and the last before the tail."""
        last = self.frozen_layers - 1
        return tuple(place for place in range(last + 1) if place == last or self.reader(place) is not None)

    def as_read(self, place: int, state: Tensor) -> Tensor:
        """What is read of a block's output [T, D]: [T, D / r] where a pool alone reads it, since pooling that again
        changes nothing; else all of it.
        """
        if place == self.frozen_layers - 1 or any(True for _ in self.downsample[self.reader(place)].parameters()):
            return state
        return self.downsample[self.reader(place)](state)

    def _side_sequences(self, sequences: Sequences) -> Sequences:
        """The same documents, with the side blocks' rotations or ALiBi channels."""
        mine = replace(sequences, rotations=rotations_at(self.side_frequencies, sequences.positions))
        return self._with_alibi(mine, self.side_args)

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """The base's, each followed by the side block that reads it."""
        for place, base in enumerate(super().blocks()):
            i = self.reader(place)
            yield from chain([base], [] if i is None else [(f"side.{i}", self.side[i])])

    def place(self, device: torch.device) -> None:
        """The side's rotations too."""
        super().place(device)
        if self.side:
            self.side_frequencies = self.side_frequencies.to(device)

    def new_cache(self, documents: int, longest: int) -> list[LayerCache]:
        """The side's behind the base's."""
        own = self._empty_caches(self.side_args, documents, longest) if self.side else []
        return super().new_cache(documents, longest) + own
