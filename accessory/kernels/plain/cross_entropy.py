"""Cross-entropy over a chunk of logits, which become their own gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from accessory.kernels.cross_entropy_steps import Reduce

LOG2_E = math.log2(math.e)


def workspace(scores: Tensor) -> Tensor | None:
    """What `losses_and_gradient` of such `scores` works in: fp32 copies of narrower ones, made once for all chunks."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return None if wide == scores.dtype else scores.new_empty(scores.shape, dtype=wide)


def losses_and_gradient(
    scores: Tensor,
    local: Tensor,
    width: int | None = None,
    reduce: Reduce | None = None,
    work: Tensor | None = None,
    likeliest: Tensor | None = None,
) -> Tensor:
    """-log p(label) of every row of scores [c, V / ranks] -> [c], fp32; `scores` become softmax minus one-hot.

    local: int64 [c], labels counted from this rank's first row of the vocabulary; some are other ranks'. width: scores
    from there on are padding, without probability or gradient. reduce: over the ranks, where there are several.
    work: of `workspace`, for as many rows at least. likeliest: bool [c], becomes true where no score is above that of
    the label.
    """
    wide = scores if work is None else work[: len(scores)].copy_(scores)
    if width is not None:
        wide[:, width:] = -torch.inf
    mine = (local >= 0) & (local < wide.shape[1])
    local = local.masked_fill(~mine, 0)
    highest = wide.amax(1)
    if reduce:
        reduce(highest, "max")
    wide.sub_(highest[:, None])
    target = wide.gather(1, local[:, None])[:, 0].masked_fill_(~mine, 0)
    # Powers of two: PyTorch makes them in a third of the time of powers of e on a CPU.
    mass = wide.mul_(LOG2_E).exp2_().sum(1)
    if reduce:
        reduce(target, "sum")
        reduce(mass, "sum")
    if likeliest is not None:
        torch.eq(target, 0, out=likeliest)
    wide.div_(mass[:, None])
    wide[torch.arange(len(local), device=local.device), local] -= mine.to(wide.dtype)
    if wide is not scores:
        scores.copy_(wide)
    return mass.log() - target


def statistics(scores: Tensor, local: Tensor, width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row of scores [c, V / ranks]: its highest, the sum of exp(score - highest), its label's; fp32 [c].

    As `accessory.kernels.triton.cross_entropy.statistics`, which explains the arguments; fp32 scores are overwritten.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if width is not None:
        wide[:, width:] = -torch.inf
    mine = (local >= 0) & (local < wide.shape[1])
    target = wide.gather(1, local.masked_fill(~mine, 0)[:, None])[:, 0].masked_fill_(~mine, 0)
    highest = wide.amax(1)
    finite = highest.clamp(min=torch.finfo(wide.dtype).min)  # where all is padding, -inf - -inf would be no number
    mass = wide.sub_(finite[:, None]).mul_(LOG2_E).exp2_().sum(1)
    return highest, mass, target
