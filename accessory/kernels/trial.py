"""A self-test: every kernel once, on a few numbers, compared with plain PyTorch, before a machine uses it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from accessory.kernels.addition import Addition
from accessory.kernels.bitsandbytes_library import functional
from accessory.kernels.codes import Codes, GroupCodes
from accessory.kernels.documents import Documents
from accessory.kernels.plain import four_bit, group_codes
from accessory.kernels.torch_compile import compile_fusible

Randn = Callable[..., Tensor]
"""Normal random numbers of a shape, in the tested dtype: the same ones for both implementations."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative: many times the rounding, less than any real fault


def fault_of(package: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the kernels `names` of `package` in `dtype` on `device`; empty: nothing."""
    try:
        wrong = wrong_kernels(package, names, device, dtype)
    except Exception as error:  # whatever a compiler, a linker, a driver or a library may raise
        return f"{type(error).__name__}: {str(error).strip()}"
    return f"the results of {', '.join(wrong)} are wrong" if wrong else ""


def wrong_kernels(package: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of those whose results differ from plain PyTorch's of the same numbers in fp32."""
    compiles = compile_fusible(False)  # a compiler would take longer than the trial
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        # Whatever the caller's contexts are; hooks that it may have on saved tensors shall not see the trial's.
        unseen = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.device("cpu"), torch.inference_mode(False), torch.no_grad(), unseen:
            return [name for name in names if not _agree(package, name, device, dtype)]
    finally:
        torch.set_default_dtype(default)
        compile_fusible(compiles)


def _agree(package: str, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    results = []
    plain = name.removesuffix("_gemv").removesuffix("_product")  # plain PyTorch multiplies with the unpacked matrix
    for module, wide in ((f"{package}.{name}", dtype), (f"plain.{plain}", torch.float32)):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape: int, generator: torch.Generator = generator, wide: torch.dtype = wide) -> Tensor:
            """Normally distributed numbers [*shape] on the device under trial, in `wide`: the same for both kernels."""
            return torch.randn(shape, generator=generator).to(dtype).to(device, wide)

        results.append(_TRIALS[name](import_module(f"accessory.kernels.{module}"), randn))
    return all(
        (found.float() - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()
        for found, wanted in zip(*results, strict=True)
    )


def _cached_attention(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """Two query heads, one key/value head; 19 keys of 24, a window of 17."""
    return [kernel.attend(randn(1, 2, 20), randn(1, 24, 1, 20), randn(1, 24, 1, 20), (19,), 17, 0.25)]


def _column_sums(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    return [kernel.column_sums(randn(5, 20))]


def _cross_entropy(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """The last 3 of 20 columns are padding. First with the likeliest labels, then with other ranks' labels."""
    scores = [randn(5, 20), randn(5, 20)]
    labels = scores[0][:, :17].argmax(1)
    losses = kernel.losses_and_gradient(scores[0], labels, 17, None, kernel.workspace(scores[0]))
    kernel.losses_and_gradient(scores[1], labels - 20, 17, None, kernel.workspace(scores[1]))
    return [losses, *scores]


def _document_attention(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """Documents of 40 and 25 tokens that share 3, two query heads, one key/value head."""
    leaves, dout = [randn(62, heads, 16).requires_grad_() for heads in (2, 1, 1)], randn(62, 2, 16)
    with torch.enable_grad():
        out = kernel.attend(*leaves, Documents.build((40, 25), (0, 3)), None, 0.25)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def _four_bit(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    nested = _codes(randn)
    plain = nested._replace(scales=randn(260).float(), nested=None)
    return [kernel.dequantize(codes, randn(130, 128)) for codes in (nested, plain)]


def _four_bit_gemv(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """15 rows = 8 + 4 + 2 + 1: every group of rows that the kernel has; two matrices, LoRA, a bias."""
    codes, x, (a, b, bias) = [_codes(randn), _codes(randn)], randn(15, 128), _additions(randn)
    if kernel is four_bit:
        w, v = (four_bit.dequantize(one, randn(130, 128)) for one in codes)
        return [x @ (w + 0.5 * b @ a).t(), x @ v.t() + bias]
    return list(kernel.Matrices(codes).multiply(x, [Addition(a=a, b=b, scale=0.5), Addition(bias)]))


def _four_bit_product(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """One matrix with bias and LoRA, and two whose products are summed."""
    codes, x, dy, low, (a, b, bias) = _codes(randn), randn(14, 128), randn(14, 130), randn(14, 4), _additions(randn)
    if kernel is four_bit:
        w = four_bit.dequantize(codes, randn(130, 128))
        return [x @ w.t() + 0.5 * low @ b.t() + bias, 2 * dy @ w + 0.5 * low @ a]
    y = kernel.sum_of_products([x], [codes], transposed=False, bias=bias, low=(low, b, 0.5))
    return [y, kernel.sum_of_products([dy, dy], [codes, codes], transposed=True, low=(low, a, 0.5))]


def _codes(randn: Randn) -> Codes:
    """W [130, 128], of whose 260 blocks 256 share a scale's scale."""
    nested = randn(256).float(), randn(2).float(), randn(1).float()
    codes, scales = (randn(n).float().mul(50).clamp(-128, 127).add(128).byte() for n in (130 * 64, 260))
    return Codes((130, 128), codes, functional.get_4bit_type("nf4", device=str(codes.device)), scales, nested)


def _additions(randn: Randn, n: int = 130, k: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """LoRA's two factors and a bias, which stay in fp32."""
    return randn(4, k).float(), randn(n, 4).float(), randn(n).float()


def _group_codes(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """Of every width, the last group of a row shorter; the last one with zero points."""
    return [kernel.dequantize(codes, randn(35, 300)) for codes in _grouped(randn)]


def _group_codes_gemv(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """As of 4-bit codes; matrices of every width together."""
    codes, x, (a, b, bias) = _grouped(randn), randn(15, 300), _additions(randn, 35, 300)
    if kernel is group_codes:
        w, v, u = (group_codes.dequantize(one, randn(35, 300)) for one in codes)
        return [x @ (w + 0.5 * b @ a).t(), x @ v.t() + bias, x @ u.t()]
    added = [Addition(a=a, b=b, scale=0.5), Addition(bias), Addition()]
    return list(kernel.Matrices(codes).multiply(x, added))


def _group_codes_product(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """One matrix with bias and LoRA, and three of every width whose products are summed."""
    codes, x, dy, low = _grouped(randn), randn(14, 300), randn(14, 35), randn(14, 4)
    a, b, bias = _additions(randn, 35, 300)
    if kernel is group_codes:
        w, v, u = (group_codes.dequantize(one, randn(35, 300)) for one in codes)
        return [x @ w.t() + 0.5 * low @ b.t() + bias, dy @ (w + v + u) + 0.5 * low @ a]
    y = kernel.sum_of_products([x], codes[:1], transposed=False, bias=bias, low=(low, b, 0.5))
    return [y, kernel.sum_of_products([dy] * 3, codes, transposed=True, low=(low, a, 0.5))]


def _grouped(randn: Randn) -> list[GroupCodes]:
    """W [35, 300] of 2, 3 and 4 bits in groups of 64, 32 and 128."""

    def uint8(*shape: int) -> Tensor:
        """Bytes, about a normal distribution around 128."""
        return randn(*shape).float().mul(50).clamp(-128, 127).add(128).byte()

    def half(*shape: int) -> Tensor:
        """Normal fp16."""
        return randn(*shape).half()

    return [
        GroupCodes((35, 300), 2, 64, uint8(35, 75), None, half(35, 5), half(35, 5)),
        GroupCodes((35, 300), 3, 32, uint8(35, 75), uint8(35, 38), half(35, 10), half(35, 10)),
        GroupCodes((35, 300), 4, 128, uint8(35, 150), None, half(35, 3), None, uint8(35, 3) % 16),
    ]


def _gate(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    x, up, dy = randn(5, 20), randn(5, 20), randn(5, 20)
    return [kernel.forward(x, up, "silu"), *kernel.backward(dy, x, up, "silu")]


def _rms_norm(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    x, dy, weight = randn(5, 20), randn(5, 20), randn(20).float()
    y, scale = kernel.forward(x, weight, 1e-5)
    recomputed = kernel.normalized(x, weight, 1e-5), kernel.recompute(x, weight, scale)
    return [y, *recomputed, *kernel.backward(dy, x, weight, scale)]


def _rotary(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """The first 16 of 20 channels are rotated, the others pass."""
    x, angles = randn(5, 1, 20), randn(5, 1, 8).float()
    rotations = torch.polar(torch.ones_like(angles), angles)
    return [kernel.rotate(x, rotations, "halves"), kernel.rotate(x, rotations.conj(), "pairs")]


_TRIALS: dict[str, Callable[[ModuleType, Randn], list[Tensor]]] = {
    trial.__name__.removeprefix("_"): trial
    for trial in (
        _cached_attention, _column_sums, _cross_entropy, _document_attention, _four_bit, _four_bit_gemv,
        _four_bit_product, _gate, _group_codes, _group_codes_gemv, _group_codes_product, _rms_norm, _rotary,
    )
}  # fmt: skip
