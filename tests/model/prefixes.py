"""LLaMA-Adapter's prefixes (Zhang et al. 2023) as a method: rows with a softmax and a gate of their own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from accessory.method import Attachment, Method
from accessory.model.attention import Attention, AttentionAddition
from accessory.model.decoder import Decoder
from accessory.model.linear import project_columns
from accessory.model.sequences import Sequences
from accessory.parallel.tensor import WHOLE, Slicing, mark

ROWS = 3


class Prefix(AttentionAddition):
    """tanh(gate) softmax(q k^T / sqrt(E)) v over k and v that the block's own wk and wv make of `rows`."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        heads = attention.wq.weight.shape[0] // attention.head_dim
        self.rows = mark(nn.Parameter(torch.empty(ROWS, attention.wk.in_features, device="meta")), WHOLE)
        self.gate = mark(nn.Parameter(torch.empty(heads, device="meta")), Slicing(dim=0))
        self.made: tuple[Tensor, Tensor] | None = None

    def forward(self, q: Tensor, sequences: Sequences, attention: Attention) -> Tensor:
        """See `AttentionAddition`."""
        keys, values = self.made or self._keys_and_values(q.dtype, attention)
        groups = q.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
        weights = torch.einsum("the,phe->thp", q, keys).div(q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("thp,phe->the", weights * self.gate.tanh()[:, None].to(q.dtype), values)

    def _keys_and_values(self, dtype: torch.dtype, attention: Attention) -> tuple[Tensor, Tensor]:
        made = project_columns(self.rows.to(dtype), [attention.wk, attention.wv])
        return tuple(t.view(ROWS, -1, attention.head_dim) for t in made)

    def prepare_decoding(self, attention: Attention) -> None:
        """Keys and values."""
        self.made = self._keys_and_values(attention.wq.weight.dtype, attention)

    def train(self, mode: bool = True) -> Prefix:
        """As every module's."""
        self.made = None
        return super().train(mode)


class Prefixes(Method):
    """In every block."""

    class Settings(BaseModel):
        """None."""

    suffix: ClassVar[str] = "_prefixes"
    summary: ClassVar[str] = "prefixes of attention"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"prefixes": {}}

    def attach(self, decoder: Decoder) -> Attachment:
        """Beside a frozen base."""
        for _, block in decoder.blocks():
            block.attention.addition = Prefix(block.attention)
        return Attachment(trainable={name for name, _ in decoder.named_parameters() if ".addition." in name})
