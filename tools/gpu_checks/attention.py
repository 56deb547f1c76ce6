"""Attention as the model calls it, against softmax(q k^T) v of each document in float64 on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from accessory import kernels
from accessory.kernels.documents import Documents
from accessory.kernels.fused_attention import HOPPER, attend, fused_for, fused_on
from accessory.kernels.plain import dropped_attention
from accessory.kernels.trial import attention_fault
from accessory.model.position import alibi_channels, alibi_slopes, append_alibi
from accessory.run.determinism import algorithms_as_before, fix_order_of_sums
from tools.gpu_checks.check import Findings, Ground, check
from tools.gpu_checks.rates import seconds_of

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.5e-3, torch.float32: 1e-4}
"""Tolerance of results; gradients may be off by twice as much."""
DTYPES = tuple(TOLERANCE)
MIXED = (1, 130, 1, 1, 517, 64, 3, 1)
"""Lengths of documents, some of a single token."""


@dataclass(frozen=True)
class Case:
    """heads: of queries, and of keys and values. width: of a head. shared: tokens in common with the document before.

    kinds: dtypes it is tried in.
    """

    name: str
    heads: tuple[int, int]
    width: int
    lengths: tuple[int, ...] = MIXED
    window: int | None = None
    shared: tuple[int, ...] | None = None
    kinds: tuple[torch.dtype, ...] = DTYPES

    @property
    def tokens(self) -> int:
        """That are packed."""
        return sum(self.lengths) - sum(self.shared or ())


CASES = (
    Case("MHA", (4, 4), 128),
    Case("GQA", (8, 2), 128),
    Case("MQA", (8, 1), 64),
    Case("window", (8, 2), 128, window=48),
    Case("window of one", (4, 2), 64, window=1),
    *(Case(f"width {width}", (4, 2), width) for width in (16, 20, 72, 80, 96, 136, 192, 256, 264)),
    Case("only single tokens", (8, 2), 128, (1,) * 9),
    Case("one long document", (8, 2), 128, (2049,)),
    Case("shared beginnings", (8, 2), 128, (130, 140, 90), shared=(0, 100, 64)),
)
TINY = (
    Case("MHA", (2, 2), 16, (1, 9, 1, 5)),
    Case("GQA", (4, 2), 20, (1, 9, 1, 5), window=4),
    Case("shared beginnings", (4, 1), 16, (9, 7), shared=(0, 5)),
)


@check(3, needs_cuda=True)
def chosen(ground: Ground, found: Findings) -> None:
    """PyTorch's fused kernels for this card: each passes its trial, and flash is taken wherever it can be."""
    capability = torch.cuda.get_device_capability(ground.device) if ground.cuda else HOPPER
    for width in (16, 20, 64, 80, 96, 128, 192, 200, 256, 264):
        for dtype in DTYPES:
            wanted = fused_for(capability, dtype, width)
            if ground.cuda and fused_on(ground.device, dtype, width) != wanted:
                fault = attention_fault(partial(attend, wanted), ground.device, dtype, width)
                found.faults.append(f"heads of {width} in {dtype}, {wanted.kernel}, fail their trial: {fault}")
            found.figures[f"{width} {str(dtype).removeprefix('torch.')}"] = wanted.kernel


@check(14, needs_cuda=True)
def gradients(ground: Ground, found: Findings) -> None:
    """Results and gradients of q, k and v: heads, widths, windows, single tokens, shared beginnings; every dtype."""
    for case in ground.pick(CASES, TINY):
        for dtype in case.kinds:
            with found.case(f"{case.name} {dtype}"):
                q, k, v, dout = _operands(case, dtype, ground.device)
                leaves = [t.requires_grad_() for t in (q, k, v)]
                documents = Documents.build(case.lengths, case.shared, ground.device)
                _compare(found, case, dtype, _attend(*leaves, documents, case.window, None), leaves, dout)


@check(2, needs_cuda=True)
def alibi(ground: Ground, found: Findings) -> None:
    """The channels that ALiBi adds, of heads as wide as a model's: against scores minus slope times distance."""
    for heads, width in ground.pick([(32, 128), (12, 64), (16, 80)], [(3, 16)]):
        for dtype in DTYPES:
            with found.case(f"ALiBi, {heads} heads of {width}, {dtype}"):
                case = Case("ALiBi", (heads, heads), width, ground.pick((300, 1, 77), (9, 1)))
                q, k, v, dout = _operands(case, dtype, ground.device)
                leaves = [t.requires_grad_() for t in (q, k, v)]
                slopes = alibi_slopes(heads)
                positions = torch.cat([torch.arange(length) for length in case.lengths]).to(ground.device)
                channels = alibi_channels(slopes.to(ground.device), positions, width, dtype)
                documents = Documents.build(case.lengths, None, ground.device)
                out = _attend(*append_alibi(*leaves, channels), documents, None, width**-0.5)[..., :width]
                _compare(found, case, dtype, out, leaves, dout, slopes)


def _compare(
    found: Findings, case: Case, dtype: torch.dtype, out: Tensor, leaves: list[Tensor], dout: Tensor,
    slopes: Tensor | None = None,
) -> None:  # fmt: skip
    """Against the formula, of the numbers that the device had."""
    name, tolerance = f"{case.name} {dtype}", TOLERANCE[dtype]
    wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
    wanted = reference(*wide, case.lengths, case.window, case.shared, slopes)
    found.close(name, out, wanted, tolerance)
    mine = torch.autograd.grad(out, leaves, dout)
    theirs = torch.autograd.grad(wanted, wide, dout.cpu().double())
    for part, one, other in zip("qkv", mine, theirs, strict=True):
        if not other.norm() < 1e-9 * theirs[2].norm():  # in documents of single tokens, scores have no gradient
            found.close(f"{name}, d{part}", one, other, 2 * tolerance)


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None = None,
    shared: tuple[int, ...] | None = None, slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q [T, H, E], k and v [T, K, E] of packed documents -> [T, H, E]: one document after the other, by the formula.

    shared: of each document's first tokens, how many are those of the document before. slopes: ALiBi's.
    """
    results, before, begin = [], torch.empty(0, dtype=torch.int64), 0
    for length, known in zip(lengths, shared or (0,) * len(lengths), strict=True):
        rows = torch.cat([before[:known], torch.arange(begin, begin + length - known)])
        queries, keys, values = (t[rows].transpose(0, 1) for t in (q, k, v))
        each = q.shape[1] // k.shape[1]
        scores = queries @ keys.repeat_interleave(each, 0).transpose(1, 2) * q.shape[-1] ** -0.5
        distance = torch.arange(length)[:, None] - torch.arange(length)
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance
        hidden = (distance < 0) | (distance >= (window or length))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        results.append((weights @ values.repeat_interleave(each, 0)).transpose(0, 1)[known:])
        before, begin = rows, begin + length - known
    return torch.cat(results)


def _attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None, scale: float | None) -> Tensor:
    """As `accessory.model.attention` calls it."""
    return kernels.of("document_attention", q, q.shape[-1]).attend(q, k, v, documents, window, scale)


def _operands(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads[0], case.heads[1], case.heads[1], case.heads[0])
    return tuple(torch.randn(case.tokens, count, case.width, generator=generator).to(device, dtype) for count in heads)


@check(2, needs_cuda=True)
def repeated(ground: Ground, found: Findings) -> None:
    """The same forward and backward ten times, of a long document: all bits are the same with `--deterministic`.

    Without it flash attention sums dq in any order: that this differs is a figure, no fault.
    """
    case = Case("repeated", ground.pick((32, 8), (2, 1)), ground.pick(128, 16), (ground.pick(4096, 40),))
    q, k, v, dout = _operands(case, torch.bfloat16, ground.device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    documents = Documents.build(case.lengths, None, ground.device)

    def once() -> list[Tensor]:
        """The result and the gradients."""
        out = _attend(*leaves, documents, None, None)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    def repeats() -> dict[str, bool]:
        """Which of them are the same every time."""
        first, equal = once(), dict.fromkeys(("out", "dq", "dk", "dv"), True)
        for _ in range(9):
            for name, one, other in zip(equal, first, once(), strict=True):
                equal[name] &= torch.equal(one, other)
        return equal

    found.figures["equal"] = repeats()
    found.expect(found.figures["equal"]["out"], "the forward gives other bits when it is repeated")
    with algorithms_as_before():
        fix_order_of_sums(True, ground.device)
        found.figures["equal_deterministic"] = equal = repeats()
    found.expect(all(equal.values()), f"with --deterministic, equal are only {equal}")


@check(3, needs_cuda=True)
def cached(ground: Ground, found: Findings) -> None:
    """New tokens against a cache: of one prompt and of several of other lengths, with and without a window."""
    heads, kv_heads, width = ground.pick((32, 8, 128), (4, 2, 16))
    longest = ground.pick(1500, 12)
    for dtype in DTYPES:
        for new, counts, window in (
            (1, (longest - 1,), None), (1, (longest, 5, longest // 2), None), (1, (longest,), 7),
            (5, (longest, 9), None), (5, (longest - 3, 8), 6),
        ):  # fmt: skip
            with found.case(name := f"{new} new of {counts} {dtype}, window {window}"):
                generator = torch.Generator().manual_seed(0)
                q = torch.randn(new * len(counts), heads, width, generator=generator).to(dtype)
                keys, values = (
                    torch.randn(len(counts), longest + 3, kv_heads, width, generator=generator).to(dtype)
                    for _ in range(2)
                )
                there = [t.to(ground.device) for t in (q, keys, values)]
                kernel = kernels.of("cached_attention", there[0], new)
                out = kernel.attend(*there, counts, window, width**-0.5)
                wanted = [
                    reference(
                        torch.cat([part.new_zeros(count - new, heads, width), part]).double(),
                        keys[i, :count].double(), values[i, :count].double(), (count,), window,
                    )[-new:]
                    for i, (part, count) in enumerate(zip(q.split(new), counts, strict=True))
                ]  # fmt: skip
                found.close(name, out, torch.cat(wanted), TOLERANCE[dtype])


@check(2, needs_cuda=True)
def dropped(ground: Ground, found: Findings) -> None:
    """Dropout of attention's weights: what was dropped in the forward is dropped in the backward, about as many."""
    case = Case("dropped", (4, 2), 64, ground.pick((300, 1, 41), (9, 1)))
    q, k, v, dout = _operands(case, torch.float32, ground.device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = dropped_attention.attend(*leaves, Documents.build(case.lengths, None, ground.device), None, None, 0.25, 7)
    mine = torch.autograd.grad(out, leaves, dout)
    kept = list(dropped_attention.kept_weights(case.lengths, 4, 2, 0.25, 7, ground.device))
    share = float(torch.cat([part.flatten() for part in kept]).float().mean())
    found.figures["kept"] = round(share, 4)
    found.expect(ground.tiny or abs(share - 0.75) < 0.01, f"{share} of the weights are kept; expected 0.75")
    wide = [t.detach().cpu().double().requires_grad_() for t in leaves]
    wanted = _dropped_reference(*wide, case.lengths, [part.cpu() for part in kept])
    found.close("dropped", out, wanted, 1e-5)
    for part, one, other in zip("qkv", mine, torch.autograd.grad(wanted, wide, dout.cpu().double()), strict=True):
        found.close(f"dropped, d{part}", one, other, 2e-5)


def _dropped_reference(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], kept: list[Tensor]) -> Tensor:
    """By the formula; kept: as `kept_weights` gives it."""
    results, begin, masks = [], 0, iter(kept)
    for length in lengths:
        at, heads = slice(begin, begin + length), []
        for head in range(k.shape[1]):
            each = q.shape[1] // k.shape[1]
            queries = q[at, head * each : (head + 1) * each].transpose(0, 1)
            scores = queries @ k[at, head].t() * q.shape[-1] ** -0.5
            weights = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
            heads.append((weights * next(masks) / 0.75) @ v[at, head])
        results.append(torch.cat(heads).transpose(0, 1))
        begin += length
    return torch.cat(results)


@check(2, needs_cuda=True)
def rates(ground: Ground, found: Findings) -> None:
    """TFLOP/s of the forward and of the backward, of 4,096 tokens in one document or in eight; 7B and 70B heads."""
    tokens = ground.pick(4096, 16)
    for heads, lengths in (
        ((32, 32), (tokens,)), ((64, 8), (tokens,)), ((32, 32), (tokens // 8,) * 8)
    ):  # fmt: skip
        with found.case(name := f"{heads[0]}_{heads[1]}_heads_{len(lengths)}_documents"):
            case = Case("rate", ground.pick(heads, (2, 1)), ground.pick(128, 16), lengths)
            q, k, v, dout = _operands(case, torch.bfloat16, ground.device)
            leaves = [t.requires_grad_() for t in (q, k, v)]
            documents = Documents.build(lengths, None, ground.device)
            flops = 4 * sum(length**2 // 2 for length in lengths) * case.heads[0] * case.width
            forward = seconds_of(lambda a=leaves, d=documents: _attend(*a, d, None, None), ground)
            both = seconds_of(
                lambda a=leaves, d=documents, g=dout: torch.autograd.grad(_attend(*a, d, None, None), a, g), ground
            )
            backward = max(both - forward, 1e-9)
            found.figures[name] = {
                "forward_us": round(1e6 * forward, 1), "forward_tflop_per_s": round(flops / forward / 1e12, 1),
                "backward_us": round(1e6 * backward, 1),
                "backward_tflop_per_s": round(2.5 * flops / backward / 1e12, 1),
            }  # fmt: skip


CHECKS = [chosen, gradients, alibi, repeated, cached, dropped, rates]
