"""One decoder block: attention and feed-forward, each behind a norm and beside a residual."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from accessory.model.args import ModelArgs
from accessory.model.attention import Attention
from accessory.model.cache import LayerCache
from accessory.model.feed_forward import FeedForward
from accessory.model.norm import RMSNorm
from accessory.model.sequences import Sequences


class Block(nn.Module):
    """x [T, D] -> [T, D]. `recompute` keeps only x for the backward and runs the block again there."""

    def __init__(self, args: ModelArgs, ranks: int, **linear) -> None:
        super().__init__()
        self.attention = Attention(args, ranks, **linear)
        self.feed_forward = FeedForward(args, ranks, **linear)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.recompute = False

    def forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        """x [T, D] -> [T, D]."""
        if self.recompute and self.training:
            return checkpoint(self._forward, x, sequences, use_reentrant=False)
        return self._forward(x, sequences, cache)

    def _forward(self, x: Tensor, sequences: Sequences, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), sequences, cache)
        return x + self.feed_forward(self.ffn_norm(x))
