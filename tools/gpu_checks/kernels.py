"""Triton's kernels against plain PyTorch in float64 on the CPU, and how near to a copy's rate they are.

On a CPU the same kernels run in Triton's interpreter, which cuts bf16 off where a GPU rounds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from accessory import kernels
from accessory.kernels.codes import BLOCK, NESTED_BLOCK, Codes, GroupCodes
from accessory.kernels.decoding import Attending
from accessory.kernels.trial import faults_of
from accessory.kernels.triton import KERNELS, working
from accessory.quant import storage
from accessory.quant.four_bit import codebook_of
from accessory.quant.moments import levels
from tools.gpu_checks.check import Findings, Ground, Skipped, check
from tools.gpu_checks.rates import copy_rate, replayed, seconds_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
"""Relative, of whole results: a rounding or two of each number (bf16 is cut off in the interpreter)."""
SLOWEST = 0.25  # share of a copy's rate, below which a kernel that only moves memory is at fault
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def _kernel(name: str, ground: Ground) -> ModuleType:
    """Triton's. Raises `Skipped` where it cannot run at all."""
    if find_spec("triton") is None:
        raise Skipped("needs Triton")
    if not ground.cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise Skipped("needs CUDA, or Triton's interpreter")
    return import_module(f"accessory.kernels.triton.{name}")


def _plain(name: str) -> ModuleType:
    return import_module(f"accessory.kernels.plain.{name}")


class Numbers:
    """Random numbers, the same in `dtype` on the device and in float64 on the CPU."""

    def __init__(self, ground: Ground, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = ground.device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, strided: bool = False) -> tuple[Tensor, Tensor]:
        """(on the device, in float64). strided: rows lie apart on the device, as in a slice of a wider matrix."""
        numbers = torch.randn(shape, generator=self.generator).to(dtype or self.dtype)
        there = numbers.to(self.device)
        if strided:
            wide = torch.zeros(*shape[:-1], shape[-1] + 24, dtype=there.dtype, device=self.device)
            wide[..., 8 : 8 + shape[-1]] = there
            there = wide[..., 8 : 8 + shape[-1]]
        return there, numbers.double()


@check(2, needs_cuda=True)
def chosen(ground: Ground, found: Findings) -> None:
    """A card with Triton uses its kernels in every dtype, after the trial that each machine makes."""
    _kernel("gate", ground)
    for dtype in DTYPES:
        missing = tuple(sorted(set(KERNELS) - working(ground.device, dtype)))
        for name, fault in faults_of("triton", missing, ground.device, dtype).items():
            found.faults.append(f"{name} in {dtype} fails its trial: {fault}")
        for name in KERNELS:
            module = kernels.on(name, ground.device, dtype).__name__
            found.expect(".triton." in module, f"{name} in {dtype} is {module}")


@check(4, needs_cuda=True)
def rms_norm(ground: Ground, found: Findings) -> None:
    """Forward, the recomputed forward, and both gradients; rows apart too."""
    kernel, plain = _kernel("rms_norm", ground), _plain("rms_norm")
    shapes = ground.pick([(129, 4096), (7, 20), (1030, 5120), (3, 65536)], [(5, 20), (3, 130)])
    for dtype, (rows, width), strided in _all(DTYPES, shapes, (False, True)):
        with found.case(name := f"rms_norm {dtype} {rows} x {width}{' strided' * strided}"):
            numbers = Numbers(ground, dtype)
            (x, x64), (dy, dy64) = (numbers(rows, width, strided=strided) for _ in range(2))
            weight, weight64 = numbers(width, dtype=torch.float32)
            y, scale = kernel.forward(x, weight, 1e-5)
            wanted, scale64 = plain.forward(x64, weight64, 1e-5)
            found.close(name, y, wanted, TOLERANCE[dtype])
            found.close(f"{name}, scale", scale, scale64, TOLERANCE[torch.float32])
            found.close(f"{name}, again", kernel.recompute(x, weight, scale), y, 0)
            for part, mine, theirs in zip(
                ("dx", "dweight"), kernel.backward(dy, x, weight, scale),
                plain.backward(dy64, x64, weight64, scale64), strict=True,
            ):  # fmt: skip
                found.close(f"{name}, {part}", mine, theirs, 2 * TOLERANCE[dtype if part == "dx" else torch.float32])


@check(5, needs_cuda=True)
def gate(ground: Ground, found: Findings) -> None:
    """Every activation, forward and backward, contiguous or in slices of wider rows."""
    kernel, plain = _kernel("gate", ground), _plain("gate")
    shapes = ground.pick([(1, 11008), (37, 28672), (5, 20), (513, 1111)], [(5, 20)])
    for dtype, activation, shape, strided in _all(DTYPES, ACTIVATIONS, shapes, (False, True)):
        with found.case(name := f"gate {activation} {dtype} {shape}{' strided' * strided}"):
            numbers = Numbers(ground, dtype)
            (x, x64), (up, up64), (dy, dy64) = (numbers(*shape, strided=strided) for _ in range(3))
            found.close(name, kernel.forward(x, up, activation), plain.forward(x64, up64, activation), TOLERANCE[dtype])
            mine, theirs = kernel.backward(dy, x, up, activation), plain.backward(dy64, x64, up64, activation)
            for part, one, other in zip(("dx", "dup"), mine, theirs, strict=True):
                found.close(f"{name}, {part}", one, other, TOLERANCE[dtype])


@check(4, needs_cuda=True)
def rotary(ground: Ground, found: Findings) -> None:
    """Both layouts, there and back, of whole heads and of their first channels."""
    kernel, plain = _kernel("rotary", ground), _plain("rotary")
    shapes = ground.pick(
        [(33, 32, 128, 64), (7, 5, 20, 8), (1, 71, 64, 32), (1025, 8, 256, 64)], [(5, 2, 20, 8), (3, 1, 16, 8)]
    )
    for dtype, (tokens, heads, width, half), layout, back in _all(DTYPES, shapes, ("pairs", "halves"), (False, True)):
        with found.case(name := f"rotary {layout} {dtype} {tokens} x {heads} x {width}{' back' * back}"):
            numbers = Numbers(ground, dtype)
            x, x64 = numbers(tokens, heads, width)
            _, angles = numbers(tokens, 1, half, dtype=torch.float32)
            rotations = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
            there, wide = rotations.to(ground.device), rotations.to(torch.complex128)
            mine = kernel.rotate(x, there.conj() if back else there, layout)
            theirs = plain.rotate(x64, wide.conj() if back else wide, layout)
            found.close(name, mine, theirs, TOLERANCE[dtype])


@check(4, needs_cuda=True)
def cross_entropy(ground: Ground, found: Findings) -> None:
    """Losses and gradients of chunks of logits, with padding, with other ranks' labels, and the likeliest labels."""
    kernel, plain = _kernel("cross_entropy", ground), _plain("cross_entropy")
    shapes = ground.pick(
        [(256, 32000, None), (1030, 32001, None), (17, 128256, 128000), (5, 20, 17)], [(5, 20, 17), (3, 4100, None)]
    )
    for dtype, (rows, columns, width) in _all(DTYPES, shapes):
        with found.case(name := f"cross_entropy {dtype} {rows} x {columns}, {width}"):
            numbers = Numbers(ground, dtype)
            scores, scores64 = numbers(rows, columns)
            local = torch.randint(-3, width or columns, (rows,), generator=numbers.generator)
            local[0] = scores64[0, : width or columns].argmax()
            likeliest = [torch.empty(rows, dtype=torch.bool, device=device) for device in (ground.device, "cpu")]
            mine = kernel.losses_and_gradient(
                scores, local.to(ground.device), width, None, kernel.workspace(scores), likeliest[0]
            )
            theirs = plain.losses_and_gradient(scores64, local, width, None, None, likeliest[1])
            own = local >= 0  # only all ranks together know the losses of the others
            found.close(name, mine.cpu()[own], theirs[own], 2e-6)
            found.close(f"{name}, gradient", scores, scores64, TOLERANCE[dtype])
            found.expect(
                torch.equal(likeliest[0].cpu()[own], likeliest[1][own]), f"{name}: other labels are the likeliest"
            )


@check(3, needs_cuda=True)
def four_bit(ground: Ground, found: Findings) -> None:
    """Unpacked NF4 and FP4, with scales of scales and without: the bits of bitsandbytes on the CPU."""
    kernel, plain = _kernel("four_bit", ground), _plain("four_bit")
    shapes = ground.pick([(512, 2816), (130, 128), (37, 66), (1, 2), (1025, 576)], [(37, 66)])
    for dtype, shape, kind in _all(DTYPES, shapes, ("nf4", "nf4_single", "fp4", "fp4_single")):
        with found.case(name := f"{kind} {dtype} {shape}"):
            codes = _random_codes(kind, shape)
            mine = kernel.dequantize(
                _moved(codes, ground.device), torch.empty(shape, dtype=dtype, device=ground.device)
            )
            wanted = plain.dequantize(codes, torch.empty(shape, dtype=torch.float32))
            _close_in_bits(found, name, mine, wanted, ground)


@check(3, needs_cuda=True)
def group_codes(ground: Ground, found: Findings) -> None:
    """Unpacked integers of 2, 3 and 4 bits in groups: the bits of plain PyTorch."""
    kernel, plain = _kernel("group_codes", ground), _plain("group_codes")
    shapes = ground.pick([(512, 2816), (35, 300), (3, 129), (1025, 576)], [(35, 300)])
    kinds = ("int2_g64", "int3_g32", "int3_g64", "int4_g128")
    for dtype, shape, kind in _all(DTYPES, shapes, kinds):
        with found.case(name := f"{kind} {dtype} {shape}"):
            codes = _random_codes(kind, shape)
            mine = kernel.dequantize(
                _moved(codes, ground.device), torch.empty(shape, dtype=dtype, device=ground.device)
            )
            wanted = plain.dequantize(codes, torch.empty(shape, dtype=torch.float32))
            _close_in_bits(found, name, mine, wanted, ground)


def _close_in_bits(found: Findings, name: str, mine: Tensor, wanted: Tensor, ground: Ground) -> None:
    """Equal, as rounded to `mine`'s dtype; in the interpreter, bf16 may be cut off."""
    exact = ground.cuda or mine.dtype != torch.bfloat16
    found.close(name, mine, wanted.to(mine.dtype) if exact else wanted, 0 if exact else TOLERANCE[mine.dtype])


@check(3, needs_cuda=True)
def split_attention(ground: Ground, found: Findings) -> None:
    """Programs share a document's cache, and the last one to finish sums up: every time to the same bits."""
    kernel, longest, width = _kernel("decoding_attention", ground), ground.pick(4096, 600), ground.pick(128, 16)
    heads, kv_heads = ground.pick((32, 8), (2, 1))
    for rows in (1, 8):
        with found.case(name := f"{rows} documents"):
            numbers = Numbers(ground, torch.bfloat16)
            _, angles = numbers(longest, width // 2, dtype=torch.float32)
            rotations = torch.polar(torch.ones_like(angles), angles).to(torch.complex64).to(ground.device)
            following, _ = numbers(16, heads * width)
            how = Attending(heads, kv_heads, width, rotations, "halves", width**-0.5, None, following)
            (keys, _), (values, _) = (numbers(rows, longest, kv_heads, width) for _ in range(2))
            projected, _ = numbers(rows, (heads + 2 * kv_heads) * width)
            positions = torch.full((rows,), longest - 1, device=ground.device)
            scratch = kernel.Scratch(how, rows, longest, ground.device)
            splits = kernel.splits_of(longest, rows * kv_heads, ground.device)
            found.figures[f"{rows}_documents_programs"] = splits
            found.expect(splits > 1 or rows > 1, f"{name}: one program has the whole cache")
            first, low = kernel.attend(how, projected, keys, values, positions, longest, scratch)
            other = torch.zeros((), dtype=torch.int64, device=ground.device)
            for _ in range(ground.pick(1000, 2)):
                out, parts = kernel.attend(how, projected, keys, values, positions, longest, scratch)
                other += (out != first).any() | (parts != low).any()
            found.expect(first.isfinite().all() and not other, f"{name}: {int(other)} times to other bits")


@check(8, needs_cuda=True)
def beyond_31_bits(ground: Ground, found: Findings) -> None:
    """Tensors of more than 2^31 numbers: their last rows, where a 32-bit offset would have turned negative."""
    numel = ground.pick((1 << 31) + (1 << 24), 1 << 12)
    for name, far in _FAR.items():
        with found.case(name):
            far(ground, found, numel)
        if ground.cuda:
            torch.cuda.empty_cache()


def _far_rms_norm(ground: Ground, found: Findings, numel: int) -> None:
    kernel, plain, width = _kernel("rms_norm", ground), _plain("rms_norm"), ground.pick(4096, 64)
    x = _noise(ground, numel // width, width)
    weight = torch.rand(width, device=ground.device)
    y, scale = kernel.forward(x, weight, 1e-5)
    dx, dweight = kernel.backward(y, x, weight, scale)
    end, weight64 = x[-5:].cpu().double(), weight.cpu().double()
    wanted, scale64 = plain.forward(end, weight64, 1e-5)
    found.close("rms_norm, last rows", y[-5:], wanted, TOLERANCE[x.dtype])
    wanted, _ = plain.backward(y[-5:].cpu().double(), end, weight64, scale64)
    found.close("rms_norm, last rows of dx", dx[-5:], wanted, 2 * TOLERANCE[x.dtype])
    step = ground.pick(1 << 15, 16)
    sums = sum(
        (y[at : at + step].float() * x[at : at + step].float() * scale[at : at + step]).sum(0, dtype=torch.float64)
        for at in range(0, len(x), step)
    )
    found.close("rms_norm, dweight of all rows", dweight, sums, 1e-4)


def _far_gate(ground: Ground, found: Findings, numel: int) -> None:
    kernel, plain, width = _kernel("gate", ground), _plain("gate"), ground.pick(11008, 64)
    x = _noise(ground, numel // width, width)
    y, end = kernel.forward(x, x, "silu"), x[-5:].cpu().double()
    found.close("gate, last rows", y[-5:], plain.forward(end, end, "silu"), TOLERANCE[x.dtype])
    dx, _ = kernel.backward(y, x, x, "silu")
    wanted, _ = plain.backward(y[-5:].cpu().double(), end, end, "silu")
    found.close("gate, last rows of dx", dx[-5:], wanted, TOLERANCE[x.dtype])


def _far_rotary(ground: Ground, found: Findings, numel: int) -> None:
    kernel, plain, width = _kernel("rotary", ground), _plain("rotary"), ground.pick(128, 16)
    heads = ground.pick(64, 4)
    x = _noise(ground, numel // (heads * width), heads, width)
    angles = torch.rand(len(x), 1, width // 2, device=ground.device)
    rotations = torch.polar(torch.ones_like(angles), angles)
    wanted = plain.rotate(x[-5:].cpu().double(), rotations[-5:].cpu().to(torch.complex128), "halves")
    found.close("rotary, last tokens", kernel.rotate(x, rotations, "halves")[-5:], wanted, TOLERANCE[x.dtype])


def _far_cross_entropy(ground: Ground, found: Findings, numel: int) -> None:
    kernel, plain, columns = _kernel("cross_entropy", ground), _plain("cross_entropy"), ground.pick(128256, 64)
    scores = _noise(ground, numel // columns, columns)
    end = scores[-5:].cpu().double()
    local = torch.arange(len(scores), device=ground.device) % columns
    losses = kernel.losses_and_gradient(scores, local, None, None, kernel.workspace(scores))
    wanted = plain.losses_and_gradient(end, local[-5:].cpu())
    found.close("cross_entropy, last rows", losses[-5:], wanted, 2e-6)
    found.close("cross_entropy, gradient of the last rows", scores[-5:], end, TOLERANCE[scores.dtype])


def _far_four_bit(ground: Ground, found: Findings, numel: int) -> None:
    """The last rows are a matrix of their own, whose scales begin a group of 256."""
    kernel, plain, columns = _kernel("four_bit", ground), _plain("four_bit"), ground.pick(16384, 64)
    rows = numel // columns // 512 * 512 if ground.cuda else 512
    device, blocks = ground.device, rows * columns // BLOCK
    nested = levels(True, device), torch.rand(-(-blocks // NESTED_BLOCK), device=device), torch.rand(1, device=device)
    table = codebook_of("nf4", device)
    whole = Codes((rows, columns), _bytes(ground, rows * columns // 2), table, _bytes(ground, blocks), nested)
    out = kernel.dequantize(whole, torch.empty(rows, columns, dtype=torch.bfloat16, device=device))
    last, each = 256, columns // BLOCK
    end = Codes(
        (last, columns), whole.codes[-last * columns // 2 :].cpu(), table.cpu(), whole.scales[-last * each :].cpu(),
        (nested[0].cpu(), nested[1][-last * each // NESTED_BLOCK :].cpu(), nested[2].cpu()),
    )  # fmt: skip
    wanted = plain.dequantize(end, torch.empty(last, columns))
    _close_in_bits(found, "four_bit, last rows", out[-last:], wanted, ground)


def _far_group_codes(ground: Ground, found: Findings, numel: int) -> None:
    kernel, plain, columns = _kernel("group_codes", ground), _plain("group_codes"), ground.pick(16384, 64)
    rows, device = max(numel // columns, 8), ground.device
    groups = columns // 64
    scales, zeros = (torch.rand(rows, groups, device=device).half() for _ in range(2))
    codes, high = (_bytes(ground, rows * columns // n).view(rows, -1) for n in (4, 8))
    whole = GroupCodes((rows, columns), 3, 64, codes, high, scales, zeros)
    out = kernel.dequantize(whole, torch.empty(rows, columns, dtype=torch.bfloat16, device=device))
    end = GroupCodes((5, columns), 3, 64, *(part[-5:].cpu().contiguous() for part in (codes, high, scales, zeros)))
    _close_in_bits(found, "group_codes, last rows", out[-5:], plain.dequantize(end, torch.empty(5, columns)), ground)


_FAR: dict[str, Callable[[Ground, Findings, int], None]] = {
    "rms_norm": _far_rms_norm, "gate": _far_gate, "rotary": _far_rotary, "cross_entropy": _far_cross_entropy,
    "four_bit": _far_four_bit, "group_codes": _far_group_codes,
}  # fmt: skip


@check(5, needs_cuda=True)
def rates(ground: Ground, found: Findings) -> None:
    """At the shapes of a 7B step of 4,096 tokens in bf16: GB/s, as a share of a copy's, and beside plain PyTorch."""
    copied = copy_rate(ground)
    found.figures["copy_gb_per_s"] = round(copied / 1e9, 1)
    for name, (moved, fast, plain) in _movers(ground).items():
        with found.case(name):
            seconds, launched, others = (seconds_of(call, ground) for call in (replayed(fast, ground), fast, plain))
            share = moved / seconds / copied
            found.figures[name] = {
                "us": round(1e6 * seconds, 1), "gb_per_s": round(moved / seconds / 1e9, 1),
                "of_copy": round(share, 2), "launched_us": round(1e6 * launched, 1), "plain_us": round(1e6 * others, 1),
            }  # fmt: skip
            if ground.cuda and not ground.tiny:
                found.expect(share > SLOWEST, f"{name}: {share:.2f} of a copy's rate; expected {SLOWEST} at least")


def _movers(ground: Ground) -> dict[str, tuple[int, Callable[[], object], Callable[[], object]]]:
    """Name -> (bytes that must be read and written, the kernel's call, plain PyTorch's)."""
    tokens, width, hidden, heads, columns = ground.pick((4096, 4096, 11008, 32, 32000), (4, 64, 96, 2, 128))
    names = ("rms_norm", "gate", "rotary", "cross_entropy", "four_bit", "group_codes")
    fast, plain = {name: _kernel(name, ground) for name in names}, {name: _plain(name) for name in names}
    x, dy = (_noise(ground, tokens, width) for _ in range(2))
    weight = torch.ones(width, device=ground.device)
    _, scale = fast["rms_norm"].forward(x, weight, 1e-5)
    a, b, dab = (_noise(ground, tokens, hidden) for _ in range(3))
    q = _noise(ground, tokens, heads, width // heads)
    angles = torch.rand(tokens, 1, width // heads // 2, device=ground.device)
    rotations = torch.polar(torch.ones_like(angles), angles)
    scores = _noise(ground, ground.pick(1024, 4), columns)
    local = torch.zeros(len(scores), dtype=torch.int64, device=ground.device)
    shape = (hidden, ground.pick(width, 64))
    out = torch.empty(shape, dtype=torch.bfloat16, device=ground.device)
    four, two = (_moved(_random_codes(kind, shape), ground.device) for kind in ("nf4", "int2_g64"))

    def both(name: str, function: str, *given: object) -> tuple[Callable[[], object], Callable[[], object]]:
        """The call of both implementations."""
        return tuple(lambda module=modules[name]: getattr(module, function)(*given) for modules in (fast, plain))

    def losses(modules: dict[str, ModuleType]) -> Callable[[], object]:
        """The loss of the same chunk again and again: it becomes its own gradient."""
        work = modules["cross_entropy"].workspace(scores)
        return lambda: modules["cross_entropy"].losses_and_gradient(scores, local, None, None, work)

    return {
        "rms_norm": (2 * x.nbytes, *both("rms_norm", "forward", x, weight, 1e-5)),
        "rms_norm_backward": (3 * x.nbytes, *both("rms_norm", "backward", dy, x, weight, scale)),
        "gate": (3 * a.nbytes, *both("gate", "forward", a, b, "silu")),
        "gate_backward": (5 * a.nbytes, *both("gate", "backward", dab, a, b, "silu")),
        "rotary_halves": (2 * q.nbytes, *both("rotary", "rotate", q, rotations, "halves")),
        "rotary_pairs": (2 * q.nbytes, *both("rotary", "rotate", q, rotations, "pairs")),
        "cross_entropy": (3 * scores.nbytes, losses(fast), losses(plain)),
        "nf4": (out.nbytes + out.numel() // 2 + out.numel() // BLOCK, *both("four_bit", "dequantize", four, out)),
        "int2_g64": (out.nbytes + out.numel() // 4 + out.numel() // 16, *both("group_codes", "dequantize", two, out)),
    }


def _all(*choices: object) -> Iterator[tuple]:
    """Every combination."""
    if not choices:
        yield ()
        return
    for one in choices[0]:
        for rest in _all(*choices[1:]):
            yield (one, *rest)


def _random_codes(kind: str, shape: tuple[int, int]) -> Codes | GroupCodes:
    """Random codes, which take less time to make than a matrix to pack."""
    weight = storage(kind)(shape)
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for name, part in weight.named_parameters():
        if part.is_floating_point():
            parts[name] = torch.rand(part.shape, generator=generator).to(part.dtype)
        else:
            parts[name] = torch.randint(0, 256, part.shape, generator=generator).to(part.dtype)
    weight.adopt(parts)
    return weight.as_codes()


def _moved(codes: Codes | GroupCodes, device: torch.device) -> Codes | GroupCodes:
    """The same on `device`."""

    def move(part: object) -> object:
        """A tensor, also one of several, moves; what else there is stays."""
        if isinstance(part, Tensor):
            return part.detach().to(device)
        several = isinstance(part, tuple) and any(isinstance(one, Tensor) for one in part)
        return tuple(map(move, part)) if several else part

    return type(codes)(*map(move, codes))


def _noise(ground: Ground, *shape: int) -> Tensor:
    """Normal random numbers in bf16, made on the device."""
    return torch.randn(shape, dtype=torch.bfloat16, device=ground.device)


def _bytes(ground: Ground, count: int) -> Tensor:
    """Random bytes, made on the device."""
    return torch.randint(0, 256, (count,), dtype=torch.uint8, device=ground.device)


CHECKS = [
    chosen, rms_norm, gate, rotary, cross_entropy, four_bit, group_codes, split_attention, beyond_31_bits, rates,
]  # fmt: skip
