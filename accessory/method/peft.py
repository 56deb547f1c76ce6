"""Norm tuning, bias tuning and LoRA (Hu et al. 2021), in any combination, beside a frozen base.

The keys and the parameter names are LLaMA2-Accessory's. NormBias is `norm_tuning` and `bias_tuning` without LoRA;
NormBiasLoRA adds `lora_rank`. Embedding and head are touched by `vocabulary_tuning` alone.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from accessory.method.base import Attachment, Method
from accessory.model.decoder import Decoder
from accessory.model.linear import Cut, Linear
from accessory.model.norm import Norm
from accessory.parallel.groups import model_parallel_group
from accessory.parallel.tensor import Slicing, mark

Target = Literal["wq", "wk", "wv", "wo", "w1", "w2", "w3"]


class LoraFactor(nn.Module):
    """One low-rank factor, fp32: `lora_a` [R, in] or `lora_b` [out, R], or this rank's slice of it."""

    def __init__(self, shape: tuple[int, int], slicing: Slicing) -> None:
        super().__init__()
        self.weight = mark(nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta")), slicing)


class LowRank:
    """What LoRA adds to a linear's local product: y += scale * (dropout(x) A^T) B^T.

    Under tensor parallelism it needs no communication of its own. Column: A is whole and B is cut with the rows of W,
    so A's gradient is this rank's share. Row: A is cut with the columns of W and B is whole, the sum over ranks that
    the base needs anyway completes the product, and B's gradient is this rank's share.

    Dropout's seed comes from the CPU's generator, which the ranks of a model-parallel group start alike and use alike:
    a column's x is whole on each of them, so all must drop the same values of it. Of a row's x each has its own slice.
    """

    def __init__(self, a: LoraFactor, b: LoraFactor, scale: float, dropout: float, cut: Cut = "column") -> None:
        self.a, self.b, self.scale, self.dropout, self.cut = a, b, scale, dropout, cut

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x [T, in], y [T, out] -> y, changed in place."""
        if not (self.dropout and self.a.training):
            return _AddLowRank.apply(y, x, self.a.weight, self.b.weight, self.scale)
        seed = int(torch.randint(1 << 62, ()))
        if self.cut == "row":
            seed += dist.get_rank(model_parallel_group())
        # What is kept grows by 1 / (1 - dropout): here, where no narrow dtype rounds it.
        scale = self.scale / (1 - self.dropout)
        return _AddLowRank.apply(y, x, self.a.weight, self.b.weight, scale, self.dropout, seed)


class _AddLowRank(torch.autograd.Function):
    """Saves x and x A^T; brackets every product so that the narrow side R is multiplied first.

    With dropout it saves x as it came, which linears beside this one share, and the backward drops the same values.
    """

    @staticmethod
    def forward(
        ctx, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0, seed: int = 0
    ) -> Tensor:
        low = (x * _kept(x, dropout, seed) if dropout else x) @ a.to(x.dtype).t()
        ctx.save_for_backward(x, low, a, b)
        ctx.scale, ctx.dropout, ctx.seed = scale, dropout, seed
        ctx.mark_dirty(y)
        return y.addmm_(low, b.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        kept = _kept(x, ctx.dropout, ctx.seed) if ctx.dropout else None
        dlow = (dy @ b.to(dy.dtype)).mul_(ctx.scale)
        dx = dlow @ a.to(dy.dtype) if ctx.needs_input_grad[1] else None
        if kept is not None:
            dx = None if dx is None else dx.mul_(kept)
            x = kept.mul_(x)
        da = (dlow.t() @ x).to(a.dtype)
        db = (dy.t() @ low).mul_(ctx.scale).to(b.dtype)
        return dy, dx, da, db, None, None, None


def _kept(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Ones and zeros of x's shape and dtype, a `dropout` of them zero: the same ones for the same seed."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=generator)


class Peft(Method):
    """Trains norms, biases and low-rank factors, each if its setting says so."""

    class Settings(BaseModel):
        """Keys of `--llama_config` that belong to this method."""

        model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

        norm_tuning: bool = True
        """Train the weights of all norms, and their biases where they have some."""
        bias_tuning: bool = True
        """Add a bias to every linear of attention and feed-forward, and train it."""
        lora_rank: int = Field(default=-1, le=1 << 16)
        """Rank R of LoRA; 0 or less leaves LoRA out."""
        lora_alpha: float | None = Field(default=None, ge=-(2.0**31), le=2.0**31)
        """LoRA is scaled by lora_alpha / lora_rank; absent means a scale of 1, as upstream."""
        lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
        """Dropout on LoRA's input while training."""
        lora_targets: list[Target] = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
        """Linears that get LoRA."""
        vocabulary_tuning: bool = False
        """Train embedding and head whole, as tokens added to the vocabulary need."""

        @model_validator(mode="after")
        def _trains_something(self) -> Peft.Settings:
            others = self.norm_tuning or self.bias_tuning or self.vocabulary_tuning
            if not (others or (self.lora_rank > 0 and self.lora_targets)):
                raise ValueError("nothing would be trained: set norm_tuning, bias_tuning, or lora_rank above 0")
            return self

        @property
        def lora_scale(self) -> float:
            """What LoRA's product is multiplied by."""
            return 1.0 if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    trains_base: ClassVar[bool] = False

    @property
    def trains_vocabulary(self) -> bool:
        """Only where it is asked for."""
        return self.settings.vocabulary_tuning

    def attach(self, decoder: Decoder) -> Attachment:
        """Add biases and LoRA factors; choose norms, biases and factors as the settings say."""
        attachment = Attachment()
        if self.settings.vocabulary_tuning:
            self._choose_vocabulary(decoder, attachment)
        for name, module in decoder.named_modules():
            if isinstance(module, Norm) and self.settings.norm_tuning:
                attachment.trainable |= {f"{name}.{leaf}" for leaf, _ in module.named_parameters()}
            elif isinstance(module, Linear):
                if self.settings.bias_tuning:
                    self._attach_bias(name, module, attachment)
                if self.settings.lora_rank > 0 and name.rsplit(".", 1)[-1] in self.settings.lora_targets:
                    self._attach_lora(name, module, attachment)
        return attachment

    @staticmethod
    def _choose_vocabulary(decoder: Decoder, attachment: Attachment) -> None:
        for name in ("tok_embeddings", "output"):
            if (module := getattr(decoder, name)) is not None:
                module.float()
                attachment.trainable.add(f"{name}.weight")

    def _attach_bias(self, name: str, linear: Linear, attachment: Attachment) -> None:
        if linear.bias is None:
            attachment.initial[f"{name}.bias"] = _zeros(linear.out_features)
        linear.add_bias(torch.float32)
        attachment.trainable.add(f"{name}.bias")

    def _attach_lora(self, name: str, linear: Linear, attachment: Attachment) -> None:
        rank, ranks = self.settings.lora_rank, linear.ranks
        if linear.cut == "column":
            linear.lora_a = LoraFactor((rank, linear.in_features), Slicing(partial=True))
            linear.lora_b = LoraFactor((linear.out_features // ranks, rank), Slicing(dim=0))
        else:
            linear.lora_a = LoraFactor((rank, linear.in_features // ranks), Slicing(dim=1))
            linear.lora_b = LoraFactor((linear.out_features, rank), Slicing(partial=True))
        linear.addition = LowRank(
            linear.lora_a, linear.lora_b, self.settings.lora_scale, self.settings.lora_dropout, linear.cut
        )
        attachment.initial[f"{name}.lora_a.weight"] = _truncated_normal(rank, linear.in_features)
        attachment.initial[f"{name}.lora_b.weight"] = _zeros(linear.out_features, rank)
        attachment.trainable |= {f"{name}.lora_a.weight", f"{name}.lora_b.weight"}


def _zeros(*shape: int):
    return lambda _generator: torch.zeros(shape)


def _truncated_normal(*shape: int, std: float = 0.02):
    return lambda generator: nn.init.trunc_normal_(
        torch.empty(shape), std=std, a=-2 * std, b=2 * std, generator=generator
    )
