"""The least work a step needs, and how fast the machine could do it: the ideal that measurements are compared with.

Per token and weight a product takes 2 FLOPs forward and 2 for the gradient of its input; none for that of a frozen
matrix. The head is counted for supervised tokens only, attention by documents (FlashAttention, Dao et al. 2022: two
products forward, five backward, over the half of the scores that are seen). Elementwise work counts as free, and so
does unpacking beside reading what is packed: it can be done where it is multiplied.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass

import torch
from torch import nn

from accessory.model.block import Block
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.quant import PackedWeight

COPIED = {"cpu": 1 << 27, "cuda": 1 << 30}  # bytes: no cache holds them
_REPEATS = 3
_SHORTEST = 0.02  # seconds that are measured at once


@dataclass(frozen=True)
class Work:
    """FLOPs of all ranks together: of linears with their LoRA and the head, of attention, and of what recomputation
    does of both again. packed: bytes of packed matrices read, as often as they are multiplied with.
    """

    products: int = 0
    attention: int = 0
    repeated: int = 0
    packed: int = 0

    @property
    def flops(self) -> int:
        """All of them."""
        return self.products + self.attention + self.repeated

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def step_work(decoder: Decoder, lengths: list[int], packed: int, supervised: int, micro_batches: int) -> Work:
    """Work of a training step on documents of `lengths` tokens, with so many labels, in `micro_batches` over all ranks.

    packed: their tokens, those that they share counted once; attention is counted as if documents were whole.
    OPT-350m's projections beside the embedding are left out.
    """
    tokens, work = packed, Work()
    below = _trained(decoder.tok_embeddings, decoder.pos_embeddings, decoder.tok_norm)
    for i, block in enumerate(decoder.layers):
        seen = sum(_seen(length, decoder.args.window(i)) for length in lengths)
        work += _block_work(block, below, tokens, seen, micro_batches)
        below = below or _trained(block)
    head = 2 * decoder.head_weight.numel() * decoder.ranks * supervised
    return work + Work(products=head * (2 + decoder.head_weight.requires_grad))


def _block_work(block: Block, below: bool, tokens: int, seen: int, micro_batches: int) -> Work:
    """below: whether anything under the block is trained, which its gradients are carried to."""
    attention, ranks = block.attention, block.attention.wq.ranks
    attending = 2 * seen * attention.wq.out_features  # FLOPs of one of its products
    repeated = block.recompute and (below or _trained(block))
    products = attended = again = packed = 0
    for before, linears in _groups(block):
        below = below or _trained(*before)
        if linears[0] is attention.wo:
            attended = attending * (2 + 5 * below)
            again += 2 * attending * repeated
        for linear in linears:
            forward, backward = _linear_flops(linear, below)
            twice = repeated and not linear.ends_block
            products += tokens * ranks * (forward + backward)
            again += tokens * ranks * (forward * twice + _low_flops(linear) * (repeated and linear.ends_block))
            if isinstance(linear.weight, PackedWeight):
                packed += ranks * micro_batches * (1 + below + twice) * linear.weight.nbytes
        below = below or _trained(*linears)
    return Work(products, attended, again, packed)


def _groups(block: Block) -> Iterator[tuple[tuple[nn.Module | None, ...], list[Linear]]]:
    """(what stands before them, linears that read the same), from below."""
    attention, feed_forward = block.attention, block.feed_forward
    yield (block.attention_norm,), [attention.wq, attention.wk, attention.wv]
    yield (attention.q_norm, attention.k_norm), [attention.wo]
    yield (block.ffn_norm,), [feed_forward.w1, *([feed_forward.w3] if feed_forward.gated else [])]
    yield (), [feed_forward.w2]


def _linear_flops(linear: Linear, below: bool) -> tuple[int, int]:
    """(forward, backward) per token of this rank's part of a linear."""
    rows, columns = linear.weight.shape
    forward, backward = 2 * rows * columns, 2 * rows * columns * below
    if not isinstance(linear.weight, PackedWeight) and linear.weight.requires_grad:
        backward += 2 * rows * columns
    if linear.lora_a is not None:
        a, b = (2 * factor.weight.numel() for factor in (linear.lora_a, linear.lora_b))
        forward += a + b
        backward += a * (1 + below) + 2 * b
    return forward, backward


def _low_flops(linear: Linear) -> int:
    """Per token, of the product that makes the numbers LoRA keeps."""
    return 0 if linear.lora_a is None else 2 * linear.lora_a.weight.numel()


def _trained(*modules: nn.Module | None) -> bool:
    return any(p.requires_grad for module in modules if module is not None for p in module.parameters())


def _seen(length: int, window: int | None) -> int:
    """Pairs of a query and a key that it sees, in one document."""
    window = min(window or length, length)
    return window * (window + 1) // 2 + (length - window) * window


def decoding_bytes(decoder: Decoder, documents: int, tokens: int) -> int:
    """What a step of decoding must read at least on this rank: all weights, and each document's cache of `tokens`.

    Of an embedding that is not the head too a few rows are read, which do not count.
    """
    weights = sum(p.nbytes for p in decoder.parameters())
    if decoder.output is not None:
        weights -= decoder.tok_embeddings.weight.nbytes
    kept = 0
    for i, layer in enumerate(decoder.new_cache(1, 1)):
        kept += min(tokens, decoder.args.window(i) or tokens) * (layer.keys.nbytes + layer.values.nbytes)
    return weights + documents * kept


def product_rate(decoder: Decoder, tokens: int, device: torch.device) -> float:
    """FLOP/s of plain products of `tokens` tokens with matrices of the first block's shapes, forward and backward."""
    shapes = Counter(tuple(m.weight.shape) for m in decoder.layers[0].modules() if isinstance(m, Linear))
    flops = seconds = 0.0
    for (rows, columns), count in shapes.items():
        x, y, w = (
            torch.randn(shape, dtype=decoder.dtype, device=device)
            for shape in ((tokens, columns), (tokens, rows), (rows, columns))
        )
        flops += count * 4 * tokens * rows * columns
        seconds += count * (_least_seconds(lambda x=x, w=w: x @ w.t(), device))
        seconds += count * (_least_seconds(lambda y=y, w=w: y @ w, device))
    return flops / seconds


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of copying what no cache holds."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / _least_seconds(lambda: target.copy_(source), device)


def _least_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the least of a few attempts that are long enough to be measured."""

    def timed(count: int) -> float:
        """Seconds of `count` calls."""
        began = time.perf_counter()
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    timed(1)
    count = max(round(_SHORTEST / timed(1)), 1)
    return min(timed(count) for _ in range(_REPEATS)) / count


def compare(work: Work, tokens: int, seconds: float, rate: float, bandwidth: float, ranks: int) -> dict[str, float]:
    """How `tokens` in `seconds` on `ranks` devices stand beside what each could do at best.

    ratio_to_ideal: of ideal time to real time. model_flop_share: of the products' rate, by FLOPs that are needed
    whatever is recomputed.
    """
    ideal = (work.flops / rate + work.packed / bandwidth) / ranks
    return {
        "matmul_flops_per_s": round(rate),
        "copy_bytes_per_s": round(bandwidth),
        "flops_per_token": round(work.flops / tokens),
        "packed_bytes_per_token": round(work.packed / tokens),
        "ideal_tokens_per_s": round(tokens / ideal, 1),
        "ratio_to_ideal": round(ideal / seconds, 4),
        "model_flop_share": round((work.flops - work.repeated) / rate / ranks / seconds, 4),
    }
