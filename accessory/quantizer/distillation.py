"""Last pass: scales and zeros of the whole packed model learn to give the full model's distribution of next tokens.

As E2E-QP in EfficientQAT (Chen et al. 2024), with the divergence from the full model in the place of the text's
cross-entropy: the text says how often a word follows, the model how likely each one is. The full model itself is not
needed: its last hidden states were kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from accessory.checkpoint.load import fill_module
from accessory.model.decoder import Decoder
from accessory.quant.groups import GroupWeight
from accessory.quant.packed import PackedState
from accessory.quant.trained_groups import TrainedStatistics, with_trained_scales, with_trained_statistics
from accessory.quantizer.adam import ImmediateAdam
from accessory.quantizer.blocks import Blocks, linears, replace_weight
from accessory.quantizer.reconstruction import train
from accessory.quantizer.states import States

RATE = 0.002
"""Learning rate of scales and zeros, in mean scales of their matrix."""
_CHUNK = 128  # tokens whose logits are alive at once


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, teacher: Tensor, head: Tensor, vocab_size: int) -> Tensor:
        """The gradient is computed here, while the logits of a chunk are there."""
        head = head[:vocab_size].to(hidden.dtype)
        total, gradient = hidden.new_zeros((), dtype=torch.float32), torch.empty_like(hidden)
        chunks = zip(hidden.split(_CHUNK), teacher.split(_CHUNK), gradient.split(_CHUNK), strict=True)
        for own, wanted, place in chunks:
            log_p = (wanted @ head.t()).float().log_softmax(1)
            log_q = (own @ head.t()).float().log_softmax(1)
            p = log_p.exp()
            total += (p * log_p.sub_(log_q)).sum()
            place.copy_(log_q.exp_().sub_(p).to(hidden.dtype) @ head)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        """Of `hidden` alone."""
        (gradient,) = ctx.saved_tensors
        return gradient * dtotal.to(gradient.dtype), None, None, None


def divergence(hidden: Tensor, teacher: Tensor, head: Tensor, vocab_size: int) -> Tensor:
    """The sum over tokens of KL(teacher || model), fp32 scalar, with a gradient for `hidden`.

    hidden, teacher [T, D]: inputs of the head [V, D], whose rows from `vocab_size` on take no part.
    """
    return _Divergence.apply(hidden, teacher, head, vocab_size)


def packed_decoder(blocks: Blocks, packed: list[dict[str, tuple[type[GroupWeight], PackedState]]]) -> Decoder:
    """The whole model with packed linears, whose scales and zeros are trained; whole zero points stay.

    packed: (storage, parts) of each linear of each block, by its name in it.
    """
    decoder = blocks.decoder
    for index, parts in enumerate(packed):
        block, name = decoder.layers[index], f"layers.{index}"
        fill_module(block, name, blocks.tensors, blocks.layout, there={f"{name}.{linear}.weight" for linear in parts})
        for linear, (kind, state) in parts.items():
            trained = with_trained_scales(kind) if kind.has("points") else with_trained_statistics(kind)
            weight = trained(tuple(linears(block)[linear].weight.shape))
            weight.adopt({part: value.to(blocks.layout.device) for part, value in state.items()})
            replace_weight(linears(block)[linear], weight)
        block.recompute = True
    return decoder


def distill(
    blocks: Blocks,
    ids: Tensor,
    teacher: States,
    steps: list[list[int]],
    rate: float,
    group: dist.ProcessGroup,
    say: Callable[[str], None],
) -> list[float]:
    """Train the statistics of `blocks.decoder`, made by `packed_decoder`; returns each step's divergence of a token.

    ids [R, S]: the rows. teacher: the full model's last block's outputs for them. say: gets a line now and then.
    """
    decoder = blocks.decoder

    def loss(rows: list[int]) -> Tensor:
        """The mean over tokens of a few rows."""
        with torch.no_grad():
            wanted = decoder.leave(teacher.read(rows).to(blocks.layout.device))
        found = decoder.leave(last_states(blocks, ids[rows]))
        return divergence(found, wanted, decoder.head_weight, decoder.args.vocab_size) / len(found)

    decoder.train()
    losses = train(steps, loss, ImmediateAdam(_rates(decoder, rate), group), say)
    decoder.eval()
    return losses


def last_states(blocks: Blocks, ids: Tensor) -> Tensor:
    """The outputs [R * S, D] of the last block of `blocks.decoder` for rows of tokens [R, S]."""
    decoder, where = blocks.decoder, blocks.sequences(*ids.shape)
    (last,) = deque(decoder.states(decoder.enter(ids.flatten().to(blocks.layout.device), where), where), maxlen=1)
    return last


def _rates(decoder: nn.Module, rate: float) -> Iterator[tuple[nn.Parameter, float]]:
    """Scales and zeros, each with its learning rate."""
    for weight in decoder.modules():
        if isinstance(weight, TrainedStatistics):
            unit = float(weight.scales.detach().abs().mean())
            yield from ((getattr(weight, name), rate * unit) for name in weight.trained)
