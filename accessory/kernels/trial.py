"""A self-test: before a machine uses a kernel, it is run once on a few numbers and compared with plain PyTorch in fp32.

The test uses the dtype that the kernel will be used in: a compiler or a processor may lack only one dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from accessory.kernels.addition import Addition
from accessory.kernels.bitsandbytes_library import functional
from accessory.kernels.codes import Codes, GroupCodes
from accessory.kernels.decoding import Attending, Products
from accessory.kernels.documents import Documents
from accessory.kernels.plain import four_bit, group_codes
from accessory.kernels.torch_compile import compile_fusible

Randn = Callable[..., Tensor]
"""Normal random numbers of a shape, in the tested dtype: the same ones for both implementations."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative: many times the rounding, less than any real fault."""


def fault_of(package: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the kernels `names` of `package` in `dtype` on `device`; empty: nothing."""
    try:
        wrong = wrong_kernels(package, names, device, dtype)
    except Exception as error:  # whatever a compiler, a linker, a driver or a library may raise
        return _described(error)
    return f"the results of {', '.join(wrong)} are wrong" if wrong else ""


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"


def faults_of(package: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What is wrong with each of the kernels `names`, tried one by one; those without a fault are left out."""
    faults: dict[str, str] = {}
    for name in names:
        if fault := fault_of(package, (name,), device, dtype):
            faults[name] = fault
    return faults


def wrong_kernels(package: str, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Names of those whose results differ from plain PyTorch's of the same numbers in fp32."""
    with _undisturbed():
        return [name for name in names if not _agree(package, name, device, dtype)]


def attention_fault(attend: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, width: int) -> str:
    """What is wrong with `attend` of whole documents, as `plain.document_attention.by_document`; empty: nothing.

    It is tried with heads of `width` channels.
    """
    results = []
    plain = import_module("accessory.kernels.plain.document_attention").by_document
    try:
        with _undisturbed():
            for attention, wide in ((attend, dtype), (plain, torch.float32)):
                randn = _numbers(device, dtype, wide)
                results.append(
                    [*_of_documents(attention, randn, width, None), *_of_documents(attention, randn, width, 17)]
                )
            agrees = _equal(*results, dtype)
    except Exception as error:  # drivers and libraries raise errors of any type
        return _described(error)
    return "" if agrees else "its results are wrong"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the caller's contexts: its hooks on saved tensors and its fake tensors must not see the trial's tensors."""
    compiles = compile_fusible(False)  # a compiler would take longer than the trial
    default, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
        unseen = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False), torch.no_grad(), unseen:
            yield
    finally:
        torch.set_default_dtype(default)
        torch.set_float32_matmul_precision(precision)
        compile_fusible(compiles)


def _agree(package: str, name: str, device: torch.device, dtype: torch.dtype) -> bool:
    results = []
    plain = name.removesuffix("_gemv").removesuffix("_product")  # plain PyTorch multiplies with the unpacked matrix
    for module, wide in ((f"{package}.{name}", dtype), (f"plain.{plain}", torch.float32)):
        kernel = import_module(f"accessory.kernels.{module}")
        results.append(_TRIALS[name](kernel, _numbers(device, dtype, wide)))
    return _equal(*results, dtype)


def _numbers(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Randn:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        """Normally distributed numbers of `dtype` [*shape], on the device under trial, in `wide`."""
        return torch.randn(shape, generator=generator).to(dtype).to(device, wide)

    return randn


def _equal(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype) -> bool:
    """Whether all results of a kernel in `dtype` are those of the one in fp32, but for rounding."""
    pairs = zip(found, wanted, strict=True)
    return all((ours.float() - theirs).norm() <= TOLERANCE[dtype] * theirs.norm() for ours, theirs in pairs)


def _cached_attention(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """Two query heads, one key/value head; 19 keys of 24, a window of 17."""
    return [kernel.attend(randn(1, 2, 20), randn(1, 24, 1, 20), randn(1, 24, 1, 20), (19,), 17, 0.25)]


def _column_sums(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    return [kernel.column_sums(randn(5, 20))]


def _cross_entropy(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """The last 3 of 4,102 columns are padding. First with the likeliest labels, then with other ranks' labels."""
    scores = [randn(5, 4102), randn(5, 4102)]
    labels = scores[0][:, :4099].argmax(1)
    losses = kernel.losses_and_gradient(scores[0], labels, 4099, None, kernel.workspace(scores[0]))
    kernel.losses_and_gradient(scores[1], labels - 4102, 4099, None, kernel.workspace(scores[1]))
    return [losses, *scores]


def _decoding_attention(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """Two query heads a key head, and one; a long document, which several GPU programs share, and a short one.

    Two have norms of queries and keys, one has ALiBi's slopes.
    """
    made: list[Tensor] = []
    for heads, window in ((2, None), (1, 300)):
        angles = randn(600, 8).float()
        rotations = torch.polar(torch.ones_like(angles), angles)
        norms = None if heads == 1 else (randn(16).float(), randn(16).float())
        how = Attending(heads, 1, 16, rotations, "halves", 0.25, window, randn(16, 16 * heads), norms, 1e-5)
        more = 8 if heads == 1 else 0
        if more:
            how = how._replace(slopes=randn(1).float().abs(), beyond=randn(600, more))
        keys, values, projected = randn(2, 600, 1, 16 + more), randn(2, 600, 1, 16 + more), randn(2, 16 * (heads + 2))
        scratch = kernel.Scratch(how, 2, 600, projected.device)
        positions = torch.tensor([599, 5], device=projected.device)
        for _ in range(2):  # the second run starts from the scratch memory that the first one left
            out, low = kernel.attend(how, projected, keys, values, positions, 600, scratch)
        made += [out, low.sum(1), keys, values]
    return made


def _decoding_groups(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """Of one row and of three; of every width, with LoRA and biases, and without."""
    codes, made = _grouped(randn, 296), []
    for rows in (1, 3):
        x, low = randn(rows, 296), randn(rows, 64).float()
        made += kernel.multiply(codes, x, low, randn(105, 16), randn(105).float())
        made += kernel.multiply(codes[1:2], x)
    return made


def _decoding_products(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """Of one row and of three: a norm and two matrices; a gate of two and what follows; one and a residual.

    The first also of plain matrices, with LayerNorm.
    """
    one, other, norm, bias, made = _codes(randn), _codes(randn), randn(128).float(), randn(260).float(), []
    other = other._replace(nested=(one.nested[0], *other.nested[1:]))  # both matrices must share the codebook of scales
    for rows in (1, 3):
        x = randn(rows, 128)
        entrance = Products((one, other), norm, 1e-5, randn(260, 16), bias)
        gated = Products((other, one), norm, 1e-5, activation="silu", following=randn(16, 130))
        down = Products((one,), b=randn(130, 16), following=randn(32, 130))
        made += kernel.multiply(entrance, x, randn(rows, 3, 32).float())[:1]
        plain, norms = (randn(130, 128), randn(130, 128)), randn(2, 128).float()
        entrance = entrance._replace(matrices=plain, norm=norms, corrections=randn(2, 32).float())
        made += kernel.multiply(entrance, x, randn(rows, 3, 32).float())[:1]
        for products, lows, residual in ((gated, None, None), (down, randn(rows, 5, 16).float(), randn(rows, 130))):
            result, low = kernel.multiply(products, x, lows, residual)
            made += [result, low.sum(1)]
    return made


def _document_attention(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    """Documents of 40 and 25 tokens that share 3, two query heads, one key/value head."""
    documents = Documents.build((40, 25), (0, 3))
    return _attended(kernel.attend, randn, documents, 16, None)


def _of_documents(attend: Callable[..., Tensor], randn: Randn, width: int, window: int | None) -> list[Tensor]:
    """Documents of 150, 1 and 37 tokens."""
    documents = Documents.build((150, 1, 37), None, randn(1).device)
    return _attended(attend, randn, documents, width, window)


def _attended(
    attend: Callable[..., Tensor], randn: Randn, documents: Documents, width: int, window: int | None
) -> list[Tensor]:
    """Result and gradients of two query heads and one key/value head."""
    leaves = [randn(documents.rows, heads, width).requires_grad_() for heads in (2, 1, 1)]
    dout = randn(documents.rows, 2, width)
    with torch.enable_grad():
        out = attend(*leaves, documents, window, 0.25)
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


def _grouped(randn: Randn, k: int = 300) -> list[GroupCodes]:
    """W [35, k] of 2, 3 and 4 bits in groups of 64, 32 and 128."""

    def uint8(*shape: int) -> Tensor:
        """Bytes, about a normal distribution around 128."""
        return randn(*shape).float().mul(50).clamp(-128, 127).add(128).byte()

    def half(*shape: int) -> Tensor:
        """Normal fp16."""
        return randn(*shape).half()

    return [
        GroupCodes((35, k), 2, 64, uint8(35, -(-k // 4)), None, half(35, 5), half(35, 5)),
        GroupCodes((35, k), 3, 32, uint8(35, -(-k // 4)), uint8(35, -(-k // 8)), half(35, 10), half(35, 10)),
        GroupCodes((35, k), 4, 128, uint8(35, -(-k // 2)), None, half(35, 3), None, uint8(35, 3) % 16),
    ]


def _gate(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    x, up, dy = randn(5, 411), randn(5, 411), randn(5, 411)
    return [kernel.forward(x, up, "silu"), *kernel.backward(dy, x, up, "silu")]


def _rms_norm(kernel: ModuleType, randn: Randn) -> list[Tensor]:
    x, dy, weight = randn(131, 20), randn(131, 20), randn(20).float()
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
        _cached_attention, _column_sums, _cross_entropy, _decoding_attention, _decoding_groups, _decoding_products,
        _document_attention, _four_bit, _four_bit_gemv, _four_bit_product, _gate, _group_codes, _group_codes_gemv,
        _group_codes_product, _rms_norm, _rotary,
    )
}  # fmt: skip
