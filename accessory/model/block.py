"""One decoder block: attention and feed-forward, each with norms and a residual."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accessory.model.args import ModelArgs
from accessory.model.attention import Attention
from accessory.model.backward_rows import backward_only
from accessory.model.cache import LayerCache
from accessory.model.feed_forward import FeedForward
from accessory.model.linear import Linear, prepare_decoding
from accessory.model.norm import make_norm
from accessory.model.offload import InputOffload
from accessory.model.recomputable import Recomputation
from accessory.model.sequences import Sequences


class Block(nn.Module):
    """x [T, D] -> h = x + attention(x) -> h + feed_forward(h) [T, D], with norms where `args.norm_placement` says.

    before: on the inputs of attention and feed-forward. after: on the sums. both: on their inputs and outputs.
    `args.parallel_residual`: feed-forward reads x instead of h.
    `recompute`: save only x for the backward and run the block again there; `offload`: move that x to host memory.
    `only_labelled`: the backward of its linears goes through tokens that have a label only.
    """

    def __init__(self, args: ModelArgs, layer: int, ranks: int, **linear) -> None:
        super().__init__()
        self.attention = Attention(args, layer, ranks, **linear)
        self.feed_forward = FeedForward(args, ranks, **linear)
        self.attention_norm = make_norm(args, args.dim)
        self.ffn_norm = make_norm(args, args.dim)
        self.placement, self.parallel = args.norm_placement, args.parallel_residual
        if self.placement == "both":
            self.attention_post_norm = make_norm(args, args.dim)
            self.ffn_post_norm = make_norm(args, args.dim)
        if self.placement == "before":
            self.feed_forward.w2.ends_block = True
            self.attention.wo.ends_block = self.parallel
        self.recompute = self.only_labelled = False
        self.offload: InputOffload | None = None

    def forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        """x [T, D] -> [T, D]."""
        if self.recompute and self.training:
            with self.offload or nullcontext():
                return checkpoint(self._forward, x, sequences, use_reentrant=False, context_fn=_contexts)
        return self._forward(x, sequences, cache)

    def linears_by_input(self) -> list[list[Linear]]:
        """The linears, grouped by the input that they share."""
        return [*self.attention.linears_by_input(), *self.feed_forward.linears_by_input()]

    def prepare_decoding(self) -> None:
        """See `Decoder.prepare_decoding`."""
        for linears in self.linears_by_input():
            prepare_decoding(linears)
        if self.attention.addition is not None:
            self.attention.addition.prepare_decoding(self.attention)

    def _forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        with backward_only(sequences.labelled if self.only_labelled else None):
            return self._computed(x, sequences, cache)

    def _computed(self, x: Tensor, sequences: Sequences, cache: LayerCache | None) -> Tensor:
        if self.placement == "after":
            x = self.attention_norm(x + self.attention(x, sequences, cache))
            return self.ffn_norm(x + self.feed_forward(x))
        attended = self.attention(self.attention_norm.recomputable(x), sequences, cache)
        if self.placement == "both":
            attended = self.attention_post_norm(attended)
        middle = x + attended
        fed = self.feed_forward(self.ffn_norm.recomputable(x if self.parallel else middle))
        if self.placement == "both":
            fed = self.ffn_post_norm(fed)
        return middle + fed


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts of a recomputed block's forward and of its recomputation."""
    return nullcontext(), Recomputation()
