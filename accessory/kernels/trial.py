"""Each kernel once, on a few numbers, against its formula: what a device that was never tried before has to pass."""

from __future__ import annotations

import torch
from torch import Tensor

from accessory.kernels import cross_entropy, four_bit, gate, rms_norm, rotary

TOLERANCE = 1e-3  # relative, in fp32: hundreds of times the rounding, far less than any real fault


def wrong_kernels(device: torch.device) -> list[str]:
    """Names of the kernels whose results differ from plain PyTorch's on `device`."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(3, 16, generator=generator).to(device) for _ in range(3))
    trials = {
        "rms_norm": _norm(a, b, c[0]),
        "gate": _gate(a, b, c),
        "rotary": _rotation(a[:, None], b[:, None, :8]),
        "four_bit": _unpacking(a, b),
        "cross_entropy": _loss(a),
    }
    return [name for name, pairs in trials.items() if not all(_close(found, wanted) for found, wanted in pairs)]


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= TOLERANCE * wanted.norm())


def _norm(x: Tensor, dy: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    y, scale = rms_norm.forward(x, weight, 1e-5)
    dx, dweight = rms_norm.backward(dy, x, weight, scale)
    inverse = (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    unit, dunit = x * inverse, dy * weight
    wanted = inverse * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    return [(y, unit * weight), (dx, wanted), (dweight, (dy * unit).sum(0))]


def _gate(x: Tensor, up: Tensor, dy: Tensor) -> list[tuple[Tensor, Tensor]]:
    dx, dup = gate.backward(dy, x, up, "silu")
    share = x.sigmoid()
    slope = share * (1 + x * (1 - share))
    return [(gate.forward(x, up, "silu"), x * share * up), (dx, dy * up * slope), (dup, dy * x * share)]


def _rotation(x: Tensor, angles: Tensor) -> list[tuple[Tensor, Tensor]]:
    turn = torch.polar(torch.ones_like(angles), angles)
    first, second = x.chunk(2, -1)
    halves = torch.complex(first, second) * turn
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn
    return [
        (rotary.rotate(x, turn, "halves"), torch.cat([halves.real, halves.imag], -1)),
        (rotary.rotate(x, turn, "pairs"), torch.view_as_real(pairs).flatten(-2)),
    ]


def _unpacking(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    codebook, nested_codebook = a.flatten()[:16].contiguous(), torch.linspace(-1, 1, 256, device=a.device)
    codes = torch.arange(64, dtype=torch.uint8, device=a.device) * 3  # two blocks
    scales = torch.tensor([40, 200], dtype=torch.uint8, device=a.device)
    nested = b[0, :1].contiguous(), b[1, :1].contiguous(), nested_codebook
    values = codebook[torch.stack([codes >> 4, codes & 15], 1).flatten().long()].view(2, 64)
    plain = nested_codebook[scales.long()] * nested[0] + nested[1]
    return [
        (four_bit.dequantize(codes, scales, codebook, (2, 64), a.dtype, nested=nested), values * plain[:, None]),
        (four_bit.dequantize(codes, plain, codebook, (2, 64), a.dtype), values * plain[:, None]),
    ]


def _loss(scores: Tensor) -> list[tuple[Tensor, Tensor]]:
    labels = torch.tensor([5, 0, 15], device=scores.device)
    gradient = scores.clone()
    highest, mass, target = cross_entropy.statistics(gradient, labels)
    cross_entropy.become_gradient(gradient, labels, highest, mass)
    one_hot = torch.nn.functional.one_hot(labels, scores.shape[1])
    wanted = -scores.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return [(mass.log() + highest - target, wanted), (gradient, scores.softmax(-1) - one_hot)]
