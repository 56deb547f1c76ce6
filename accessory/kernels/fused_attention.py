"""Attention of packed documents by PyTorch's fused kernels on CUDA, which never write scores to memory.

`flash` (Dao 2023) is the faster one. It needs tensor cores of Ampere or later, half precision, and heads of up to 256
channels; key/value heads may be fewer than query heads. `efficient` (Rabe & Staats 2021) takes any GPU, fp32 and any
width, and is given each query head's own keys and values. Both take heads in multiples of eight channels: zeros behind
the channels of q, k and v change no score, and give zeros that are cut off.

Both sum q's gradient in the order in which the GPU's processors end, unless PyTorch's deterministic algorithms are on.
They are called by the operations that PyTorch's own nested tensors call them by: `varlen_attn` takes no grouped heads
in torch 2.11.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from accessory.kernels.documents import Documents
from accessory.kernels.operands import processors
from accessory.kernels.trial import attention_fault

HOPPER = 9, 0
_AMPERE = 8, 0
_SMALL_SHARED_MEMORY = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))
"""Compute capabilities where flash has no gradient for heads of 200 to 224 channels, but has one for 256."""
_FLASH_WIDEST = 256
_EIGHT, _LSE_ROWS, _FLASH_PADDING = 8, 32, 128
_CAUSAL = 1  # the efficient kernel's number for a causal mask in which first query and first key are aligned


class Fused(NamedTuple):
    """A fused kernel, the dtype that it computes in, and the channels that heads are padded to."""

    kernel: Literal["flash", "efficient"]
    dtype: torch.dtype
    width: int

    def key_heads(self, heads: int, kv_heads: int) -> int:
        """How many key/value heads the kernel is given."""
        return kv_heads if self.kernel == "flash" else heads

    def copies(self, head_dim: int, dtype: torch.dtype) -> bool:
        """Whether heads of `head_dim` channels in `dtype` are copied into wider ones, or into another dtype."""
        return self.width > head_dim or self.dtype != dtype


def fused_for(capability: tuple[int, int], dtype: torch.dtype, width: int) -> Fused | None:
    """The kernel for a GPU of compute `capability`, and heads of `width` channels in `dtype`; None: there is none.

    bf16 is computed in fp32 where tensor cores have none.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    padded = -(-width // _EIGHT) * _EIGHT
    if capability >= _AMPERE and dtype != torch.float32 and padded <= _FLASH_WIDEST:
        lacking = capability in _SMALL_SHARED_MEMORY and 192 < padded <= 224
        return Fused("flash", dtype, _FLASH_WIDEST if lacking else padded)
    emulated = dtype == torch.bfloat16 and capability < _AMPERE
    return Fused("efficient", torch.float32 if emulated else dtype, padded)


def fused_on(device: torch.device, dtype: torch.dtype, width: int) -> Fused | None:
    """The kernel for `device`, tried once; without a GPU, as in plans for one, the kernel for Hopper.

    A kernel that fails or computes wrongly is logged with its error, and None is returned.
    """
    if device.type != "cuda":
        return None
    return _tried(device, dtype, width) if torch.cuda.is_initialized() else fused_for(HOPPER, dtype, width)


@lru_cache
def _tried(device: torch.device, dtype: torch.dtype, width: int) -> Fused | None:
    found = fused_for(torch.cuda.get_device_capability(device), dtype, width)
    fault = found and attention_fault(lambda *given: attend(found, *given), device, dtype, width)
    if fault:
        logging.getLogger(__name__).warning(
            "PyTorch's %s attention does not work in %s with heads of %d on %s, documents are computed one by one: %s",
            found.kernel, dtype, width, device, fault,
        )  # fmt: skip
    return None if fault else found


def attend(
    fused: Fused, q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float | None
) -> Tensor:
    """As `document_attention.attend`, for whole documents; there must be at least one token."""
    width, dtype = q.shape[-1], q.dtype
    scale = width**-0.5 if scale is None else scale
    if fused.kernel == "efficient" and (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k, v = (F.pad(t.to(fused.dtype), (0, fused.width - width)) if fused.width > width else t.to(fused.dtype)
               for t in (q, k, v))  # fmt: skip
    compute = _flash if fused.kernel == "flash" else _efficient
    return compute(q, k, v, documents, window, scale)[..., :width].to(dtype)


def _flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
    offsets, longest = documents.offsets, documents.longest
    sizes = offsets, offsets, longest, longest
    window_size = {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}
    causal = window is None
    return torch.ops.aten._flash_attention_forward(q, k, v, *sizes, 0.0, causal, False, scale=scale, **window_size)[0]


def _efficient(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float) -> Tensor:
    return _Efficient.apply(q, k, v, documents.offsets, documents.longest, window, scale)


class _Efficient(torch.autograd.Function):
    """Attention with a gradient of ours: PyTorch's own for this operation ignores the window."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, window: int | None, scale: float
    ) -> Tensor:
        """q, k and v [T, H, E] -> [T, H, E]; offsets: where documents begin and end, int32."""
        sizes, saves = (offsets, offsets, longest, longest), any(ctx.needs_input_grad)
        whole, *kept = torch.ops.aten._efficient_attention_forward(
            q[None], k[None], v[None], None, *sizes, 0.0, _CAUSAL, saves, scale=scale, window_size=window
        )[:4]  # fmt: skip
        out = whole[0]
        ctx.save_for_backward(q, k, v, offsets, out, *kept)
        ctx.how = longest, window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        """dout [T, H, E] -> gradients of q, k and v, in their shapes and dtype."""
        q, k, v, offsets, out, statistics, seed, offset = ctx.saved_tensors
        longest, window, scale = ctx.how
        found = torch.ops.aten._efficient_attention_backward(
            dout[None], q[None], k[None], v[None], None, out[None], offsets, offsets, longest, longest, statistics, 0.0,
            seed, offset, _CAUSAL, False, scale=scale, window_size=window,
        )  # fmt: skip
        return *(gradient[0] for gradient in found[:3]), None, None, None, None


def forward_bytes(
    fused: Fused, lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Peak bytes of a forward that saves nothing, beside q, k, v and the result: for the memory plan."""
    own = _copied(fused, heads, kv_heads, head_dim, dtype)
    cut = heads * (fused.width * fused.dtype.itemsize if fused.copies(head_dim, dtype) else 0)
    return sum(lengths) * (own + cut) + _statistics_bytes(fused, lengths, heads)


def kept_bytes(
    fused: Fused, lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes that are saved for the backward beside q, k and v themselves: result, statistics, and copies of the three.

    A copy takes the place of its original, which is freed: only the difference in size counts.
    """
    copied, result = _copied(fused, heads, kv_heads, head_dim, dtype), heads * fused.width * fused.dtype.itemsize
    before = head_dim * dtype.itemsize
    if fused.copies(head_dim, dtype):
        replaced = before * (heads + 2 * kv_heads)
    else:
        replaced = before * 2 * kv_heads if copied else 0
    return sum(lengths) * (copied - replaced + result) + _statistics_bytes(fused, lengths, heads)


def backward_bytes(fused: Fused, lengths: tuple[int, ...], heads: int, kv_heads: int, device: torch.device) -> int:
    """Peak bytes of the backward beside q, k, v, the result and its gradient: for the memory plan.

    Gradients of q, and of k and v for each query head, are in the kernel's dtype; q's is summed in fp32. Flash's sums
    of few heads are cut over idle processors if they must be equal in equal runs, and then added.
    """
    tokens, item = sum(lengths), fused.dtype.itemsize
    gradients = tokens * fused.width * item * (3 * heads + 2 * (kv_heads if kv_heads < heads else 0))
    if fused.kernel == "efficient":
        return gradients + tokens * heads * (4 * fused.width + 4)
    splits = 1
    if torch.are_deterministic_algorithms_enabled():
        splits = -(-_processors(device) // (len(lengths) * heads))
    step = 32 if fused.width <= 128 else 64
    summed = -(-fused.width // step) * step
    return gradients + (tokens + _FLASH_PADDING * len(lengths)) * heads * 4 * (splits * summed + 1)


def _processors(device: torch.device) -> int:
    """How many multiprocessors `device` has; without a GPU, as many as an H100 or H200."""
    return processors(device) if torch.cuda.is_initialized() else 132


def _copied(fused: Fused, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes a token of the copies of q, k and v that the kernel is given."""
    keys = 2 * fused.key_heads(heads, kv_heads)
    if fused.copies(head_dim, dtype):
        return fused.width * fused.dtype.itemsize * (heads + keys)
    return head_dim * dtype.itemsize * keys if keys > 2 * kv_heads else 0


def _statistics_bytes(fused: Fused, lengths: tuple[int, ...], heads: int) -> int:
    """Bytes of each query's log of the sum of exponentials."""
    if fused.kernel == "flash":
        return 4 * heads * sum(lengths)
    return 4 * heads * len(lengths) * (-(-max(lengths) // _LSE_ROWS) * _LSE_ROWS)
