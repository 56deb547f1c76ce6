"""What each kernel computes, in float64: pairs of what an implementation finds in a dtype, and what is right."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.kernels.codes import Codes, GroupCodes
from accessory.kernels.documents import Documents
from accessory.quant.four_bit import codebook_of

Pairs = list[tuple[Tensor, Tensor]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Of the norm: some roundings."""

ON_THEIR_OWN = {"four_bit_gemv", "four_bit_product", "group_codes_gemv", "group_codes_product"}
"""Kernels without a plain one: where they do not compute, their callers unpack the matrix and multiply with it."""


def check(name: str, kernel: ModuleType, dtype: torch.dtype) -> None:
    """All results of the kernel `name` are right."""
    for found, exact in FORMULAS[name](kernel, dtype):
        assert found.shape == exact.shape
        assert (found.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def derived(function: Callable[..., Tensor], dy: Tensor, *given: Tensor) -> list[Tensor]:
    """Value and gradients of `function` in float64."""
    leaves = [t.detach().double().requires_grad_() for t in given]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


def rms_norm(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """Eps shows; one gradient without the other is what it is with it."""
    x, dy, weight, eps = random(7, 48, dtype=dtype), random(7, 48, dtype=dtype, seed=1), random(48, seed=2), 1e-2
    y, dx, dweight = derived(lambda a, w: F.rms_norm(a, (48,), w, eps), dy, x, weight)
    found, scale = kernel.forward(x, weight, eps)
    inverse = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    gradients = kernel.backward(dy, x, weight, scale)
    (one, no), (none, other) = (
        kernel.backward(dy, x, weight, scale, need_dx=need, need_dweight=not need) for need in (True, False)
    )
    assert no is None and none is None
    again, decoded = kernel.recompute(x, weight, scale), kernel.normalized(x, weight, eps)
    results = found, again, decoded, scale, *gradients, one, other
    return list(zip(results, (y, y, y, inverse, dx, dweight, dx, dweight), strict=True))


def rotary(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """In both layouts, forth and back; the last channels of a head pass."""
    x, angles, pairs = random(5, 3, 20, dtype=dtype), random(5, 1, 8, seed=1), []
    for sign in (1, -1):
        rotations = torch.polar(torch.ones_like(angles), angles)
        rotations = rotations if sign == 1 else rotations.conj()
        for layout, places in (("pairs", torch.arange(16).view(8, 2)), ("halves", torch.arange(16).view(2, 8).t())):
            a, b = x.double()[..., places].unbind(-1)
            cosine, sine, exact = angles.double().cos(), sign * angles.double().sin(), x.double().clone()
            exact[..., places] = torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1)
            pairs.append((kernel.rotate(x, rotations, layout), exact))
    return pairs


def gate(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """Of the activation that all know."""
    x, up, dy = (random(6, 40, dtype=dtype, seed=i) for i in range(3))
    y, dx, dup = derived(lambda a, b: F.silu(a) * b, dy, x, up)
    found = kernel.forward(x, up, "silu"), *kernel.backward(dy, x, up, "silu")
    return list(zip(found, (y, dx, dup), strict=True))


def cross_entropy(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """The last of 40 columns are padding, above any score."""
    scores, labels = 3 * random(9, 40, dtype=dtype), torch.arange(9) * 4
    labels[::2] = scores[::2, :35].argmax(1)
    expected, likeliest = scores[:, :35].argmax(1) == labels, torch.empty(9, dtype=torch.bool)
    losses, gradient = derived(lambda s: F.cross_entropy(s, labels, reduction="none"), torch.ones(9), scores[:, :35])
    scores[:, 35:] = 100
    work = kernel.workspace(scores)
    found = kernel.losses_and_gradient(scores, labels, 35, None, work, likeliest)
    assert torch.equal(likeliest, expected) and 5 <= expected.sum() < 9
    return [(found, losses), (scores, F.pad(gradient, (0, 5)))]


def column_sums(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """Of many rows."""
    x = random(300, 20, dtype=dtype)
    found = kernel.column_sums(x)
    assert found.dtype == torch.float32
    return [(found, x.double().sum(0))]


def attended(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """The last queries [S, H, E] of one document, keys and values [n, K, E] of all."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    scores = torch.einsum("ihe,jhe->hij", q, k) * scale
    hidden = (distance < 0) | (distance >= window)
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def cached_attention(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """One new token of each of two documents."""
    q, keys, values = (random(2, *shape, 16, dtype=dtype, seed=i) for i, shape in enumerate([(4,), (24, 2), (24, 2)]))
    exact = [
        attended(q[i : i + 1].double(), keys[i, :n].double(), values[i, :n].double(), 17, 0.3)
        for i, n in enumerate((19, 5))
    ]
    return [(kernel.attend(q, keys, values, (19, 5), 17, 0.3), torch.cat(exact))]


def document_attention(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """Three documents, of which the second begins as the first: values and gradients."""
    lengths, shared = (30, 25, 9), (0, 12, 0)
    rows = [torch.arange(30), torch.cat([torch.arange(12), torch.arange(30, 43)]), torch.arange(43, 52)]
    q, k, v, dout = (random(52, n, 16, dtype=dtype, seed=i).requires_grad_(i < 3) for i, n in enumerate((4, 2, 2, 4)))
    out = kernel.attend(q, k, v, Documents.build(lengths, shared), 20, 0.3)
    found = out, *torch.autograd.grad(out, (q, k, v), dout)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [attended(q[at], k[at], v[at], 20, 0.3) for at in rows]
        return torch.cat([part[known:] for part, known in zip(parts, shared, strict=True)])

    return list(zip(found, derived(exact, dout, q, k, v), strict=True))


def matrix(nested: bool) -> tuple[Codes, Tensor]:
    """W [130, 128], of whose 260 blocks 256 share a scale's scale; its weights written out."""
    codes, scales = (torch.arange(n).mul(37).byte() for n in (130 * 64, 260))
    book, groups, offset = random(256), random(2, seed=1), random(1, seed=2)
    table = codebook_of("nf4")
    values = table[torch.stack([codes >> 4, codes & 15], 1).long()].double().view(260, 64)
    plain = (book[scales.long()] * groups.repeat_interleave(256)[:260] + offset).double()
    if nested:
        return Codes((130, 128), codes, table, scales, (book, groups, offset)), (values * plain[:, None]).view(130, 128)
    return Codes((130, 128), codes, table, plain.float(), None), (values * plain[:, None]).view(130, 128)


def four_bit(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """Scales of scales, or plain ones; in the memory that is given."""
    pairs = []
    for nested in (True, False):
        codes, w = matrix(nested)
        memory = torch.empty(130, 128, dtype=dtype)
        assert kernel.dequantize(codes, memory) is memory
        pairs.append((memory, w))
    return pairs


def four_bit_product(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """One matrix with bias and LoRA; and two, transposed."""
    (one, w), (other, v) = matrix(True), matrix(False)
    x, dy, low = (random(14, n, dtype=dtype, seed=n) for n in (128, 130, 4))
    a, b, bias = random(4, 128), random(130, 4), random(130)
    y = kernel.sum_of_products([x], [one], transposed=False, bias=bias, low=(low, b, 0.5))
    dx = kernel.sum_of_products([dy, dy], [one, other], transposed=True, low=(low, a, 0.5))
    x, dy, low, a, b, bias = (t.double() for t in (x, dy, low, a, b, bias))
    return [(y, x @ w.t() + 0.5 * low @ b.t() + bias), (dx, dy @ (w + v) + 0.5 * low @ a)]


def four_bit_gemv(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """Two matrices, one with LoRA and the other with a bias."""
    (one, w), (other, v) = matrix(True), matrix(False)
    x, a, b, bias = random(5, 128, dtype=dtype), random(4, 128), random(130, 4), random(130)
    found = kernel.Matrices([one, other]).multiply(x, [Addition(a=a, b=b, scale=0.5), Addition(bias)])
    x, a, b, bias = (t.double() for t in (x, a, b, bias))
    return list(zip(found, (x @ (w + 0.5 * b @ a).t(), x @ v.t() + bias), strict=True))


def grouped(
    shape: tuple[int, int], bits: int, group: int, *, points: bool = False, wide: bool = False, seed: int = 0
) -> tuple[GroupCodes, Tensor]:
    """W of random codes and statistics, and its weights in float64, written out. wide: its statistics are fp32."""
    generator = torch.Generator().manual_seed(seed)
    (n, k), groups = shape, -(-shape[1] // group)
    whole = torch.randint(1 << bits, shape, generator=generator)
    scales, zeros = (torch.rand(n, groups, generator=generator).sub_(0.3) for _ in range(2))
    zero_points = torch.randint(1 << bits, (n, groups), generator=generator, dtype=torch.uint8)
    if not wide:
        scales, zeros = scales.half(), zeros.half()
    of = torch.arange(k) // group
    if points:
        weights = (whole - zero_points[:, of].double()) * scales[:, of].double()
    else:
        weights = whole * scales[:, of].double() - zeros[:, of].double()
    codes = bytes_of(whole, 4) if bits == 4 else bytes_of(whole & 3, 2)
    high = bytes_of(whole >> 2, 1) if bits == 3 else None
    given = (None, zero_points) if points else (zeros, None)
    return GroupCodes(shape, bits, group, codes, high, scales, *given), weights


def bytes_of(numbers: Tensor, width: int) -> Tensor:
    """Numbers of `width` bits [n, k], the first in the lowest bits of a byte; what is behind the last is not zero."""
    numbers = F.pad(numbers, (0, -numbers.shape[1] % (8 // width)), value=1).unflatten(1, (-1, 8 // width))
    return (numbers << torch.arange(0, 8, width)).sum(2).to(torch.uint8)


def of_every_width() -> list[tuple[GroupCodes, Tensor]]:
    """W [35, 300] of 2, 3 and 4 bits, whose last groups are shorter."""
    return [grouped((35, 300), 2, 64), grouped((35, 300), 3, 32, seed=1), grouped((35, 300), 4, 128, points=True)]


def group_codes(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """Of every width, in the memory that is given."""
    pairs = []
    for codes, w in of_every_width():
        memory = torch.empty(35, 300, dtype=dtype)
        assert kernel.dequantize(codes, memory) is memory
        pairs.append((memory, w))
    return pairs


def group_codes_product(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """Each matrix with bias and LoRA; and all, transposed."""
    matrices = of_every_width()
    x, dy, low = (random(14, n, dtype=dtype, seed=n) for n in (300, 35, 4))
    a, b, bias = random(4, 300), random(35, 4), random(35)
    more = 0.5 * low.double() @ b.double().t() + bias.double()
    pairs = []
    for codes, w in matrices:
        y = kernel.sum_of_products([x], [codes], transposed=False, bias=bias, low=(low, b, 0.5))
        pairs.append((y, x.double() @ w.t() + more))
    dx = kernel.sum_of_products([dy] * 3, [codes for codes, _ in matrices], transposed=True, low=(low, a, 0.5))
    return [*pairs, (dx, dy.double() @ sum(w for _, w in matrices) + 0.5 * low.double() @ a.double())]


def group_codes_gemv(kernel: ModuleType, dtype: torch.dtype) -> Pairs:
    """All matrices at once, one with LoRA and another with a bias."""
    matrices = of_every_width()
    x, a, b, bias = random(5, 300, dtype=dtype), random(4, 300), random(35, 4), random(35)
    added = [Addition(a=a, b=b, scale=0.5), Addition(bias), Addition()]
    found = kernel.Matrices([codes for codes, _ in matrices]).multiply(x, added)
    x, a, b, bias = (t.double() for t in (x, a, b, bias))
    exact = [x @ w.t() + more for (_, w), more in zip(matrices, (0.5 * x @ a.t() @ b.t(), bias, 0), strict=True)]
    return list(zip(found, exact, strict=True))


FORMULAS: dict[str, Callable[[ModuleType, torch.dtype], Pairs]] = {
    function.__name__: function
    for function in (
        rms_norm, rotary, gate, cross_entropy, column_sums, cached_attention, document_attention, four_bit,
        four_bit_product, four_bit_gemv, group_codes, group_codes_product, group_codes_gemv,
    )
}  # fmt: skip
