"""Each kernel once, on a few numbers, against its formula: what a machine's compiler has to pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from accessory.kernels.avx512 import (
    cached_attention,
    column_sums,
    cross_entropy,
    document_attention,
    four_bit_gemv,
    four_bit_product,
    gate,
    rms_norm,
    rotary,
)
from accessory.kernels.avx512.four_bit import Codes

TOLERANCE = 2e-2  # relative: some times bf16's rounding, far less than any real fault


def wrong_kernels() -> list[str]:
    """Names of the kernels whose results differ from plain PyTorch's. Raises `CannotCompile`."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():  # whatever the first to ask is in
        return _wrong_kernels(torch.Generator().manual_seed(0))


def _wrong_kernels(generator: torch.Generator) -> list[str]:
    a, b, c = (torch.randn(5, 20, generator=generator, dtype=torch.float32).bfloat16() for _ in range(3))
    trials = {
        "cached_attention": _cached_attention(generator),
        "column_sums": [(column_sums.column_sums(a), a.float().sum(0))],
        "cross_entropy": _loss(a),
        "document_attention": _attention(generator),
        "four_bit_gemv": _few_rows(generator),
        "four_bit_product": _product(generator),
        "gate": _gate(a, b, c),
        "rms_norm": _norm(a, b, c[0].float()),
        "rotary": _rotation(a[:, None], b[:, None, :8].float()),
    }
    return [name for name, pairs in trials.items() if not all(_close(found, wanted) for found, wanted in pairs)]


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found.float() - wanted).norm() <= TOLERANCE * wanted.norm())


def _loss(scores: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The last three of 20 columns are padding."""
    labels, gradient, wide = torch.tensor([5, 0, 16, 1, 7]), scores.clone(), scores[:, :17].double()
    highest, mass, target = cross_entropy.statistics(gradient, labels, 17)
    cross_entropy.become_gradient(gradient, labels, highest, mass, 17)
    best, shares = wide.amax(-1), wide.softmax(-1)
    shares[range(5), labels] -= 1
    wanted = best, (wide - best[:, None]).exp().sum(-1), wide[range(5), labels], F.pad(shares, (0, 3))
    return list(zip((highest, mass, target, gradient), wanted, strict=True))


def _attention(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """One document of 40 tokens, two query heads, one other."""
    q, dout, k, v = (torch.randn(40, n, 16, generator=generator, dtype=torch.float32).bfloat16() for n in (2, 2, 1, 1))
    documents = document_attention.Documents.build((40,), (0,), None)
    found = document_attention.forward(q, k, v, documents, None, 0.25)
    gradients = document_attention.backward(q, k, v, dout, documents, None, 0.25)
    wide_q, wide_dout, wide_k, wide_v = (t.float().transpose(0, 1) for t in (q, dout, k, v))
    scores = (0.25 * wide_q @ wide_k.mT).masked_fill(torch.ones(40, 40).triu(1).bool(), -torch.inf)
    weights = scores.softmax(-1)
    dweights = wide_dout @ wide_v.mT
    dscores = 0.25 * weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    wanted = (
        weights @ wide_v,
        dscores @ wide_k,
        (dscores.mT @ wide_q).sum(0, keepdim=True),
        (weights.mT @ wide_dout).sum(0, keepdim=True),
    )
    return [(t.transpose(0, 1), w) for t, w in zip((found, *gradients), wanted, strict=True)]


def _cached_attention(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Two query heads, one other; 19 keys of 24, of which 17 are seen."""
    q, keys, values = (
        torch.randn(*shape, 20, generator=generator, dtype=torch.float32).bfloat16()
        for shape in ((1, 2), (1, 24, 1), (1, 24, 1))
    )
    found = cached_attention.attend(q, keys, values, (19,), 17, 0.25)
    weights = (0.25 * q[0].float() @ keys[0, 2:19, 0].float().t()).softmax(-1)
    return [(found[0], weights @ values[0, 2:19, 0].float())]


def _matrix(generator: torch.Generator) -> tuple[Codes, Tensor]:
    """Of 130 rows, of whose 260 blocks 256 share a scale's scale; and plain."""
    shape, table = (130, 128), torch.linspace(-1, 1, 16, dtype=torch.float32)
    codes = torch.randint(256, (130 * 64,), generator=generator, dtype=torch.uint8)
    scales = torch.randint(256, (260,), generator=generator, dtype=torch.uint8)
    book, nested = torch.linspace(0, 1, 256, dtype=torch.float32), torch.tensor([2.0, 0.5], dtype=torch.float32)
    values = torch.stack([table[(codes >> 4).long()], table[(codes & 15).long()]], -1).view(-1, 64)
    w = (values * (nested.repeat_interleave(256)[:260] * book[scales.long()] + 2)[:, None]).view(shape)
    return Codes(shape, codes, table, scales, (book, nested, nested[:1])), w


def _few_rows(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Fifteen, so that each number of rows that go together is among them; two matrices, LoRA, a bias."""
    (one, w), (other, v) = _matrix(generator), _matrix(generator)
    x, a, b, bias = (
        torch.randn(size, generator=generator, dtype=torch.float32) for size in ((15, 128), (4, 128), (130, 4), (130,))
    )
    x = x.bfloat16()
    beside = [four_bit_gemv.Beside(a=a, b=b, scale=0.5), four_bit_gemv.Beside(bias)]
    found = four_bit_gemv.Matrices([one, other]).multiply(x, beside)
    wanted = x.float() @ (w + 0.5 * b @ a).t(), x.float() @ v.t() + bias
    return list(zip(found, wanted, strict=True))


def _product(generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """One matrix, with all that may stand beside it."""
    packed, w = _matrix(generator)
    x, dy, low, a, b, bias = (
        torch.randn(size, generator=generator, dtype=torch.float32)
        for size in ((14, 128), (14, 130), (14, 4), (4, 128), (130, 4), (130,))
    )
    x, dy, low = x.bfloat16(), dy.bfloat16(), low.bfloat16()
    y = four_bit_product.sum_of_products([x], [packed], transposed=False, bias=bias, low=(low, b, 0.5))
    dx = four_bit_product.sum_of_products([dy, dy], [packed, packed], transposed=True, low=(low, a, 0.5))
    wide = x.float() @ w.t() + 0.5 * low.float() @ b.t() + bias
    return [(y, wide), (dx, 2 * dy.float() @ w + 0.5 * low.float() @ a)]


def _gate(x: Tensor, up: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
    dx, dup = gate.backward(dy, x, up, "silu")
    y = gate.forward(x, up, "silu")
    x, up, dy = x.float(), up.float(), dy.float()
    share = x.sigmoid()
    return [(y, x * share * up), (dx, dy * up * share * (1 + x * (1 - share))), (dup, dy * x * share)]


def _norm(x: Tensor, dy: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    y, scale = rms_norm.forward(x, weight, 1e-5)
    dx, dweight = rms_norm.backward(dy, x, weight, scale)
    x, dy = x.float(), dy.float()
    inverse = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    unit, dunit = x * inverse, dy * weight
    wanted = inverse * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    return [(y, unit * weight), (dx, wanted), (dweight, (dy * unit).sum(0))]


def _rotation(x: Tensor, angles: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The first 16 of 20 channels turn, the others pass."""
    turn, wide = torch.polar(torch.ones_like(angles), angles), x.float()
    first, second, rest = wide.split([8, 8, 4], -1)
    halves = torch.complex(first, second) * turn
    pairs = torch.view_as_complex(wide[..., :16].unflatten(-1, (-1, 2)).contiguous()) * turn.conj()
    return [
        (rotary.rotate(x, turn, "halves"), torch.cat([halves.real, halves.imag, rest], -1)),
        (rotary.rotate(x, turn.conj(), "pairs"), torch.cat([torch.view_as_real(pairs).flatten(-2), rest], -1)),
    ]
