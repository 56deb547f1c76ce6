"""Bytes that are alive only for a moment while a block runs: formulas of its modules' sizes on this rank."""

from __future__ import annotations

from dataclasses import replace

import torch

from accessory import kernels
from accessory.kernels import fused_attention
from accessory.kernels.fused_attention import fused_on
from accessory.kernels.plain import dropped_attention
from accessory.memory.kept import KeptByBlock
from accessory.model.block import Block
from accessory.model.linear import scale_bytes
from accessory.model.norm import Norm, RMSNorm
from accessory.model.position import ALIBI_WIDTH


def normalizing_bytes(norm: Norm, tokens: int, dtype: torch.dtype, device: torch.device) -> int:
    """Of a norm's result, and of the two wide copies by which narrow values get there without a kernel of its own."""
    wide = torch.promote_types(dtype, torch.float32)
    fused = isinstance(norm, RMSNorm) and kernels.fast("rms_norm", device, dtype)
    return tokens * len(norm.weight) * (dtype.itemsize + (0 if fused or wide == dtype else 2 * wide.itemsize))


class BlockWork:
    """Of `block` for documents of `lengths` tokens, computed in `dtype` on `device`.

    On CUDA a fused kernel computes the attention of all documents; `KeptByBlock`, which is measured on a CPU, does
    not contain it.
    """

    def __init__(self, block: Block, lengths: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        ranks = attention.wo.ranks
        self.lengths, self.tokens, self.dtype, self.device = lengths, sum(lengths), dtype, device
        self.channels, self.inner = attention.wo.out_features, feed_forward.w2.in_features // ranks
        self.parts = 3 if feed_forward.gated else 1 if feed_forward.activation == "relu" else 2
        self.scaled = feed_forward.w2.scale is not None
        self.gated, self.chosen = feed_forward.gated, block.only_labelled
        self.window, self.position = attention.window, attention.position
        self.heads, self.kv_heads = (
            linear.out_features // attention.head_dim // ranks for linear in (attention.wq, attention.wk)
        )
        self.narrow_head = attention.head_dim
        self.head_dim = attention.head_dim + (ALIBI_WIDTH if self.position == "alibi" else 0)
        self.normalizing = normalizing_bytes(block.ffn_norm, self.tokens, dtype, device)
        self.drops, self.addition = bool(attention.dropout), attention.addition
        self.fused = None if self.drops else fused_on(device, dtype, self.head_dim)

    def kept(self, measured: KeptByBlock) -> KeptByBlock:
        """What is kept by the kernel in use, where another's was measured.

        A fused one keeps its result, too. That is the tensor that `wo` reads, except with ALiBi, whose heads are wider,
        and where something is added to it.
        """
        if self.fused is None or not measured.goes_back:
            return measured
        sizes = self.heads, self.kv_heads, self.head_dim, self.dtype
        more = fused_attention.kept_bytes(self.fused, self.lengths, *sizes)
        copied = self.addition is not None or self.fused.copies(self.head_dim, self.dtype)
        read_by_wo = self.position != "alibi" and not copied
        if measured.keeps_attended and read_by_wo:
            more -= self.tokens * self.heads * self.head_dim * self.dtype.itemsize
        return replace(measured, all=measured.all + more)

    def forward(self, measured: KeptByBlock) -> int:
        """Peak of the forward of a block that keeps nothing, with what is held meanwhile.

        In attention: the normalized input, q, k and v, what rotation or ALiBi makes of them, attention's result and
        its workspace, or what a method adds to it, then the product with it. In feed-forward: attention's part, the sum
        with it, that normalized, what is between the matrices, and the result. Between them: the first two, and the
        work of normalizing.
        """
        width, heads, kv_heads = self.dtype.itemsize, self.heads, self.kv_heads
        projected = (heads + 2 * kv_heads) * self.narrow_head
        turned = {"rotary": (heads + kv_heads) * self.narrow_head, "alibi": (heads + 2 * kv_heads) * self.head_dim}
        result = self.channels * self.tokens * width
        numbers = self.channels + projected + turned.get(self.position, 0) + heads * self.head_dim
        attention = self.tokens * width * numbers + max(self._attending(), self._adding(2), result)
        feed_forward = 4 * result + self.tokens * width * self.parts * self.inner
        return measured.held + max(attention, feed_forward, 2 * result + self.normalizing)

    def backward(self, measured: KeptByBlock) -> int:
        """Peak of the backward, beside what the block keeps."""
        return max(self._feed_forward_backward(), self._attention_backward() - measured.after_attention)

    def _feed_forward_backward(self) -> int:
        """Gradients of the block's output, of the input of w2, and of the activation's one or two inputs (F each).

        Where the backward goes through labelled tokens only: w2's input, its gradient and that of its output once more,
        for those tokens, of which there may be as many. Or, where outputs are scaled, two of these gradients and what a
        scale's works in.
        """
        inner = 3 if self.gated or self.chosen else 2
        one = self.tokens * self.dtype.itemsize
        made = one * (self.channels * (1 + self.chosen) + inner * self.inner)
        if not self.scaled:
            return made
        return max(made, made - one * self.inner + scale_bytes(self.tokens, self.inner, self.device))

    def _attention_backward(self) -> int:
        """Gradients of the sum after attention and of attention's result, and the bytes of attention's own backward.

        Before it comes that of what a method adds to attention, which leaves a gradient of the queries.
        """
        given = self.tokens * self.dtype.itemsize * (self.channels + self.heads * self.head_dim)
        if self.fused is None:
            own = self._kernel("backward_bytes")
        else:
            own = fused_attention.backward_bytes(self.fused, self.lengths, self.heads, self.kv_heads, self.device)
        left = 0 if self.addition is None else self.tokens * self.heads * self.narrow_head * self.dtype.itemsize
        return given + max(self._adding(1), left + own)

    def _adding(self, tensors: int) -> int:
        """What a method's addition works in, and `tensors` as large as its result: itself, the sum, a gradient."""
        if self.addition is None:
            return 0
        made = tensors * self.tokens * self.heads * self.narrow_head * self.dtype.itemsize
        return made + self.addition.work_bytes(self.tokens, self.heads, self.narrow_head, self.device)

    def _attending(self) -> int:
        """Workspace of attention's forward."""
        if self.fused is None:
            return self._kernel("forward_bytes")
        sizes = self.heads, self.kv_heads, self.head_dim, self.dtype
        return fused_attention.forward_bytes(self.fused, self.lengths, *sizes)

    def _kernel(self, name: str) -> int:
        kernel = kernels.on("document_attention", self.device, self.dtype, self.head_dim)
        kernel = dropped_attention if self.drops else kernel
        sizes = self.heads, self.kv_heads, self.head_dim
        return getattr(kernel, name)(self.lengths, *sizes, self.dtype, self.window)
