"""One decoder block: attention and feed-forward, each beside a norm and a residual."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accessory.model.args import ModelArgs
from accessory.model.attention import Attention
from accessory.model.cache import LayerCache
from accessory.model.feed_forward import FeedForward
from accessory.model.linear import prepare_decoding
from accessory.model.norm import make_norm
from accessory.model.offload import InputOffload
from accessory.model.recomputed import RunningAgain
from accessory.model.sequences import Sequences


class Block(nn.Module):
    """x [T, D] -> x + its attention, then + its feed-forward [T, D]; `args.norm_placement` says where norms stand.

    before: on what attention and feed-forward read. after: on the sums. both: on what they read and on what they add.
    `args.parallel_residual`: feed-forward reads x rather than the sum with attention.
    `recompute` keeps only x for the backward and runs the block again there; `offload` moves that x out of the way.
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
        self.recompute = False
        self.offload: InputOffload | None = None

    def forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        """x [T, D] -> [T, D]."""
        if self.recompute and self.training:
            with self.offload or nullcontext():
                return checkpoint(self._forward, x, sequences, use_reentrant=False, context_fn=_contexts)
        return self._forward(x, sequences, cache)

    def prepare_decoding(self) -> None:
        """Make ready for single tokens."""
        for linears in (*self.attention.called_together(), *self.feed_forward.called_together()):
            prepare_decoding(linears)
        if self.attention.addition is not None:
            self.attention.addition.prepare_decoding(self.attention)

    def _forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        if self.placement == "after":
            x = self.attention_norm(x + self.attention(x, sequences, cache))
            return self.ffn_norm(x + self.feed_forward(x))
        attended = self.attention(self.attention_norm.recomputed(x), sequences, cache)
        if self.placement == "both":
            attended = self.attention_post_norm(attended)
        middle = x + attended
        fed = self.feed_forward(self.ffn_norm.recomputed(x if self.parallel else middle))
        if self.placement == "both":
            fed = self.ffn_post_norm(fed)
        return middle + fed


def _contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Of a recomputed block's two runs."""
    return nullcontext(), RunningAgain()
