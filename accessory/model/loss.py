"""Cross-entropy over supervised tokens only, a chunk of them at a time, with its gradient computed in the forward.

Only one chunk's logits exist at a time. Under tensor parallelism each rank holds its rows of the vocabulary, and only
statistics are communicated (vocab-parallel cross-entropy, Megatron-LM).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from accessory import kernels
from accessory.kernels.cross_entropy_steps import Reduce
from accessory.model.teaching import Lesson, Teaching, lesson_work_bytes
from accessory.parallel.groups import model_parallel_group

CHUNK = 256  # supervised tokens whose logits are alive at once
GPU_CHUNK = 1024  # tokens: with fewer, a product would leave some of a GPU's processors idle
ALIGNED = 64  # a GPU's rows of logits begin at multiples of so many numbers: its fastest products need aligned rows


def cross_entropy_sum(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    weights: Tensor | None = None,
    hits: Tensor | None = None,
    counted: Tensor | None = None,
    teaching: Teaching | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """Sum over supervised tokens of -log p(label), fp32 scalar; with `teaching`, of what that makes of it.

    hidden [T, D]; head [V / ranks, D], this rank's rows; labels [T], negative where not supervised. The whole
    head's rows from `vocab_size` on are padding and take no part; None: there are none. weights: fp32 [T], by which
    each summand is multiplied; None: all are 1. hits: fp64 [], to which `counted` [T] (None: the weights) is added of
    the labels that no other token is likelier than. rows: the supervised tokens, int64 [L]; None: they are looked for.
    """
    counted = weights if counted is None else counted
    rows = (labels >= 0).nonzero()[:, 0] if rows is None else rows
    return _ChunkedCrossEntropy.apply(hidden, head, labels, vocab_size, weights, hits, counted, teaching, rows)


def chunk_rows(device: torch.device) -> int:
    """For how many supervised tokens logits exist at once."""
    return GPU_CHUNK if device.type == "cuda" else CHUNK


def new_logits(hidden: Tensor, tokens: int, rows: int) -> Tensor:
    """Uninitialized logits [tokens, rows of a head], where hidden states lie and in their dtype."""
    return hidden.new_empty(tokens, _row_numbers(rows, hidden.device))[:, :rows]


def _row_numbers(rows: int, device: torch.device) -> int:
    """Numbers from one row of logits to the next."""
    return -(-rows // ALIGNED) * ALIGNED if device.type == "cuda" else rows


def chunk_bytes(tokens: int, rows: int, device: torch.device, dtype: torch.dtype, taught: bool = False) -> int:
    """Peak bytes of logits, for so many supervised tokens and rows of a head: for the memory plan.

    taught: with those of a teacher.
    """
    scores = torch.empty(min(tokens, chunk_rows(device)), rows, dtype=dtype, device="meta")
    work = kernels.on("cross_entropy", device, dtype).workspace(scores)
    own = len(scores) * _row_numbers(rows, device) * dtype.itemsize
    beside = own + lesson_work_bytes(len(scores), rows, device, dtype) if taught else 0
    return own + (0 if work is None else work.nbytes) + beside


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        head: Tensor,
        labels: Tensor,
        vocab_size: int | None,
        weights: Tensor | None,
        hits: Tensor | None,
        counted: Tensor | None,
        teaching: Teaching | None,
        rows: Tensor,
    ) -> Tensor:
        """As `cross_entropy_sum`, whose arguments these are; the gradients are made here, while logits are at hand."""
        most = chunk_rows(hidden.device)
        want_hidden, want_head = ctx.needs_input_grad[:2]
        matrix = head.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weights = None if weights is None else weights.to(wide)
        dhidden = hidden.new_empty(len(rows), hidden.shape[1]) if want_hidden else None
        dhead = torch.zeros(head.shape, dtype=wide, device=head.device) if want_head else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        # Allocated once: for each chunk, that would cost more than the arithmetic.
        scores = new_logits(hidden, min(len(rows), most), len(head))
        kernel = kernels.of("cross_entropy", hidden)
        work = kernel.workspace(scores)
        all_reduce = reduce_over_ranks()
        before, width = rows_of_rank(len(head), vocab_size)
        lesson = None
        if teaching is not None:
            lesson = Lesson(teaching, scores, rows_of_rank(len(head), teaching.vocab_size)[1], all_reduce)
        for begin in range(0, len(rows), most):
            chunk = rows[begin : begin + most]
            x, scores = hidden[chunk], scores[: len(chunk)]
            torch.mm(x, matrix.t(), out=scores)
            if lesson is not None:
                lesson.compare(chunk, scores)
            likeliest = None if hits is None else torch.empty(len(chunk), dtype=torch.bool, device=hidden.device)
            losses = kernel.losses_and_gradient(scores, labels[chunk] - before, width, all_reduce, work, likeliest)
            if lesson is not None:
                losses = lesson.teach(scores, losses, None if weights is None else weights[chunk])
            if likeliest is not None:
                hits += likeliest.sum() if counted is None else likeliest.double() @ counted[chunk].double()
            total += losses.sum(dtype=torch.float64) if weights is None else losses.double() @ weights[chunk].double()
            if dhidden is not None:
                torch.mm(scores, matrix, out=dhidden[begin : begin + most])
            if dhead is not None:
                dhead += scores.t() @ (x if weights is None else _scaled(x, weights[chunk]))
        if dhidden is not None and len(rows) and all_reduce:
            all_reduce(dhidden)
        ctx.save_for_backward(rows, dhidden, dhead, weights)
        ctx.shape, ctx.head_dtype = hidden.shape, head.dtype
        return total.to(wide)

    @staticmethod
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """dloss, a scalar -> gradients of hidden [T, D] and head [V, D] in their dtypes, those that are wanted."""
        rows, dhidden, dhead, weights = ctx.saved_tensors
        most = chunk_rows(rows.device)
        if dhidden is not None:
            full = dhidden.new_zeros(ctx.shape)
            # In dloss's own dtype: 1 / (supervised tokens) loses digits in bf16, and fp16's loss scale overflows.
            for at, part in zip(rows.split(most), dhidden.split(most), strict=True):
                full[at] = _scaled(part, dloss if weights is None else dloss * weights[at])
            dhidden = full
        return dhidden, (dhead * dloss).to(ctx.head_dtype) if dhead is not None else None, *(None,) * 7


def _scaled(rows: Tensor, factors: Tensor) -> Tensor:
    """rows [N, D] times factors [] or [N], in the factors' dtype and rounded once."""
    return (rows.to(factors.dtype) * (factors[:, None] if factors.dim() else factors)).to(rows.dtype)


def reduce_over_ranks() -> Reduce | None:
    """What replaces each model-parallel rank's tensor by the sum or maximum over them; None where there is one rank."""
    return _all_reduce if dist.get_world_size(model_parallel_group()) > 1 else None


def rows_of_rank(rows: int, vocab_size: int | None) -> tuple[int, int | None]:
    """(rows of the head that lie before this rank's `rows`, how many of these are no padding; None: all)."""
    before = dist.get_rank(model_parallel_group()) * rows
    return before, None if vocab_size is None else min(max(vocab_size - before, 0), rows)


def _all_reduce(tensor: Tensor, operation: Literal["max", "sum"] = "sum") -> None:
    dist.all_reduce(tensor, {"max": dist.ReduceOp.MAX, "sum": dist.ReduceOp.SUM}[operation], model_parallel_group())
