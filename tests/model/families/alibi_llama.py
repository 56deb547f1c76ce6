"""LLaMA's block with ALiBi in place of rotation, in double precision and straight from the papers.

Touvron et al. 2023 (the block), Zhang & Sennrich 2019 (RMSNorm), Shazeer 2020 (SwiGLU), Press et al. 2022 (ALiBi).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class AlibiLlama:
    """The weights of a transformers LLaMA, without groups of heads, read with ALiBi."""

    def __init__(self, state: dict[str, Tensor], heads: int, eps: float) -> None:
        self.state = {name.removeprefix("model."): value.double() for name, value in state.items()}
        self.heads, self.eps = heads, eps
        self.layers = 1 + max(int(name.split(".")[1]) for name in self.state if name.startswith("layers."))

    def logits(self, ids: Tensor) -> Tensor:
        """Ids [S] -> logits [S, V]."""
        x = self.state["embed_tokens.weight"][ids]
        for i in range(self.layers):
            x = x + self._attention(self._norm(x, f"layers.{i}.input_layernorm"), f"layers.{i}.self_attn")
            h = self._norm(x, f"layers.{i}.post_attention_layernorm")
            gate, up = (self._linear(h, f"layers.{i}.mlp.{name}_proj") for name in ("gate", "up"))
            x = x + self._linear(gate * torch.sigmoid(gate) * up, f"layers.{i}.mlp.down_proj")
        return self._linear(self._norm(x, "norm"), "lm_head")

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """`count` ids behind `ids`, each from the whole text before it."""
        text = list(ids)
        for _ in range(count):
            text.append(int(self.logits(torch.tensor(text))[-1].argmax()))
        return text[len(ids) :]

    def _attention(self, h: Tensor, name: str) -> Tensor:
        q, k, v = (self._linear(h, f"{name}.{x}_proj").unflatten(1, (self.heads, -1)).transpose(0, 1) for x in "qkv")
        places = torch.arange(len(h), dtype=torch.float64)
        distance = places[:, None] - places
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]) - slopes(self.heads)[:, None, None] * distance
        weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
        return self._linear((weights @ v).transpose(0, 1).flatten(1), f"{name}.o_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].t()

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.state[f"{name}.weight"]


def slopes(heads: int) -> Tensor:
    """Powers of 2^(-8/n); for another number of heads those of the power of two below, and every other one above."""

    def powers(n: int) -> list[float]:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]

    below = 2 ** math.floor(math.log2(heads))
    return torch.tensor((powers(below) + powers(2 * below)[0::2])[:heads], dtype=torch.float64)
