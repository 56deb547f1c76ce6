"""Cross-entropy over supervised tokens only, a chunk of them at a time, its gradient made in the forward.

The logits of a chunk live for a moment; those of the whole batch never. Under tensor parallelism each rank holds its
rows of the vocabulary, and only sums travel (vocab-parallel cross-entropy, Megatron-LM).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from accessory import kernels
from accessory.parallel.groups import model_parallel_group

CHUNK = 256  # supervised tokens whose logits are alive at once
LOG2_E = math.log2(math.e)


def cross_entropy_sum(hidden: Tensor, head: Tensor, labels: Tensor, vocab_size: int | None = None) -> Tensor:
    """Sum over supervised tokens of -log p(label), fp32 scalar.

    hidden [T, D]; head [V / ranks, D], this rank's rows; labels [T], negative where not supervised. Of all ranks' rows
    together those from `vocab_size` on are padding: they take no part. Absent, there are none.
    """
    return _ChunkedCrossEntropy.apply(hidden, head, labels, vocab_size)


def chunk_bytes(tokens: int, rows: int, device: torch.device, dtype: torch.dtype) -> int:
    """Most bytes of logits at once, for so many supervised tokens and rows of a head: for a plan of memory."""
    wide = torch.promote_types(dtype, torch.float32).itemsize
    if device.type == "cpu" and kernels.chosen("cross_entropy", device, dtype):  # a GPU need not be here to be planned
        wide = 0
    return min(tokens, CHUNK) * rows * (dtype.itemsize + wide)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, head: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
        rows = (labels >= 0).nonzero()[:, 0]
        want_hidden, want_head = ctx.needs_input_grad[:2]
        matrix = head.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        dhidden = hidden.new_empty(len(rows), hidden.shape[1]) if want_hidden else None
        dhead = torch.zeros(head.shape, dtype=wide, device=head.device) if want_head else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        most = min(len(rows), CHUNK), len(head)
        narrow = hidden.new_empty(most)  # one pair of buffers: made anew they would cost more than what fills them
        kernel = kernels.chosen("cross_entropy", hidden.device, hidden.dtype)
        scores = narrow if kernel else hidden.new_empty(most, dtype=wide)
        for begin in range(0, len(rows), CHUNK):
            chunk = rows[begin : begin + CHUNK]
            x, narrow, scores = hidden[chunk], narrow[: len(chunk)], scores[: len(chunk)]
            torch.mm(x, matrix.t(), out=narrow)
            if kernel:
                total += _loss_and_gradient_by_kernel(kernel, narrow, labels[chunk], vocab_size)
            else:
                scores.copy_(narrow)
                _leave_out_padding(scores, vocab_size)
                total += _loss_and_gradient(scores, labels[chunk])
                narrow.copy_(scores)
            if dhidden is not None:
                torch.mm(narrow, matrix, out=dhidden[begin : begin + CHUNK])
            if dhead is not None:
                dhead += narrow.t() @ x
        if dhidden is not None and len(rows):
            _sum_over_ranks(dhidden)
        ctx.save_for_backward(rows, dhidden, dhead)
        ctx.shape, ctx.head_dtype = hidden.shape, head.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, dhidden, dhead = ctx.saved_tensors
        if dhidden is not None:
            full = dhidden.new_zeros(ctx.shape)
            # In dloss's own width: one over the supervised tokens loses digits in bf16, fp16's loss scale overflows.
            for at, part in zip(rows.split(CHUNK), dhidden.split(CHUNK), strict=True):
                full[at] = (part.to(dloss.dtype) * dloss).to(part.dtype)
            dhidden = full
        return dhidden, (dhead * dloss).to(ctx.head_dtype) if dhead is not None else None, None, None


def _leave_out_padding(scores: Tensor, vocab_size: int | None) -> None:
    """Give the rows from `vocab_size` on no probability: `scores` [c, V / ranks] is changed."""
    if vocab_size is not None:
        before = dist.get_rank(model_parallel_group()) * scores.shape[1]
        scores[:, max(vocab_size - before, 0) :] = -torch.inf


def _loss_and_gradient(scores: Tensor, labels: Tensor) -> Tensor:
    """Sum of the chunk's losses; `scores` [c, V / ranks] is overwritten with softmax minus the one-hot labels."""
    group = model_parallel_group()
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    local = labels - rank * scores.shape[1]
    mine = (local >= 0) & (local < scores.shape[1])
    local = local.masked_fill(~mine, 0)
    highest = scores.amax(1)
    if ranks > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
    scores.sub_(highest[:, None])
    target = scores.gather(1, local[:, None])[:, 0].masked_fill_(~mine, 0)
    # Powers of two: PyTorch makes them in a third of the time of powers of e on a CPU.
    mass = scores.mul_(LOG2_E).exp2_().sum(1)
    _sum_over_ranks(target)
    _sum_over_ranks(mass)
    scores.div_(mass[:, None])
    scores[torch.arange(len(labels), device=labels.device), local] -= mine.to(scores.dtype)
    return (mass.log() - target).sum(dtype=torch.float64)


def _loss_and_gradient_by_kernel(kernel: ModuleType, scores: Tensor, labels: Tensor, vocab_size: int | None) -> Tensor:
    """The same of scores in any dtype, without a wide copy of them; those from `vocab_size` on are left out here."""
    group, columns = model_parallel_group(), scores.shape[1]
    before = dist.get_rank(group) * columns
    local, width = labels - before, columns if vocab_size is None else min(max(vocab_size - before, 0), columns)
    highest, mass, target = kernel.statistics(scores, local, width)
    if dist.get_world_size(group) > 1:
        mine = highest.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        mass *= (mine - highest).exp()
        _sum_over_ranks(mass)
        _sum_over_ranks(target)
    kernel.become_gradient(scores, local, highest, mass, width)
    return (mass.log() + highest - target).sum(dtype=torch.float64)


def _sum_over_ranks(tensor: Tensor) -> None:
    group = model_parallel_group()
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, group=group)
