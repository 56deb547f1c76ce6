"""Which kernels multiply with matrices in groups, and that a mix of widths is theirs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from accessory.kernels.addition import Addition
from accessory.kernels.avx512 import group_codes_product, packed_products
from accessory.quant import STORAGES, PackedWeight, storage
from accessory.quant.groups import group_storage
from accessory.quant.products import memory_to_multiply, multiply, sum_of_products
from tests import cpu_kernels

CPU = torch.device("cpu")
MIX = ["int2_g64", "int4_g128", "int3_g32"]


@pytest.fixture(autouse=True)
def there() -> None:
    """The C++ kernels."""
    cpu_kernels.require()


def packed(name: str, shape: tuple[int, int] = (34, 190)) -> PackedWeight:
    """A random matrix."""
    weight = storage(name)(shape)
    weight.pack(random(*shape))
    return weight


def random(*shape: int) -> Tensor:
    """Normal numbers, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found: Tensor, exact: Tensor) -> bool:
    """Up to the roundings of bf16."""
    return bool((found.double() - exact).norm() <= 1e-2 * exact.norm())


@pytest.mark.parametrize("name", [name for name in STORAGES if name.startswith("int") and "_g" in name])
def test_every_storage_is_multiplied_by_the_kernel(name: str) -> None:
    """Not unpacked whole, in bf16; in fp32 it is."""
    weight, x = packed(name), random(5, 190).bfloat16()
    assert weight.product_kernel([weight], torch.bfloat16, CPU) is group_codes_product
    assert weight.product_kernel([weight], torch.float32, CPU) is None
    assert close(multiply(x, weight), x.double() @ weight.unpack(torch.float64).t())


def test_a_mix_is_summed_at_once() -> None:
    """As wq, wk and wv of different widths give their input's gradient; the workspace is as large as is planned."""
    weights, dys = [packed(name) for name in MIX], [random(5 + i, 34)[:5].bfloat16() for i in range(3)]
    exact = sum(dy.double() @ w.unpack(torch.float64) for dy, w in zip(dys, weights, strict=True))
    packed_products._kept.__dict__.clear()
    assert close(sum_of_products(dys, weights, transposed=True), exact)
    shapes, kept = [weight.shape for weight in weights], packed_products._kept.memory.nbytes
    assert group_codes_product.workspace_bytes(shapes, 0, 5, transposed=True) == kept
    workspace, buffer = memory_to_multiply(weights, [0, 0, 0], 5, torch.bfloat16, CPU, backward=True)
    assert workspace >= kept
    assert buffer == 0


def test_a_mix_is_decoded_at_once() -> None:
    """With LoRA on one of them; training ends it."""
    first, *others = weights = [packed(name) for name in MIX]
    x, a, b = random(2, 190).bfloat16(), random(4, 190), random(34, 4)
    added = [Addition(a=a, b=b, scale=0.5), Addition(), Addition()]
    assert first.decode_products(x, others, added) is None
    first.prepare_decoding(others)
    found = first.decode_products(x, others, added)
    for y, weight, low in zip(found, weights, (0.5 * b @ a, 0, 0), strict=True):
        assert close(y, x.double() @ (weight.unpack(torch.float64) + low).t())
    assert first.decode_products(x, [], added) is None
    first.train()
    assert first.decode_products(x, others, added) is None


def test_what_the_kernel_does_not_take_is_unpacked() -> None:
    """Groups of 16, as a cut may leave; 4-bit codes beside it."""
    small = group_storage(2, 16)((34, 192))
    small.pack(random(34, 192))
    x = random(5, 192).bfloat16()
    assert small.product_kernel([small], torch.bfloat16, CPU) is None
    assert close(multiply(x, small), x.double() @ small.unpack(torch.float64).t())
    nf4, dy = packed("nf4", (34, 192)), random(5, 34).bfloat16()
    found = sum_of_products([dy, dy], [nf4, small], transposed=True)
    assert close(found, dy.double() @ (nf4.unpack(torch.float64) + small.unpack(torch.float64)))
    small.prepare_decoding([nf4])
    nf4.prepare_decoding([packed("int2_g64", (34, 192))])
    assert small.prepared is nf4.prepared is None


@pytest.mark.parametrize("also", [("order",), ("channel_scale",), ("order", "channel_scale")])
def test_matrices_with_their_own_order_are_decoded_one_by_one(also: tuple[str, ...]) -> None:
    """Beside one without; with LoRA they are not, since its A has the channels of x."""
    plain = packed("int2_g64")
    own = group_storage(2, 64, also)(plain.shape)
    parts = {
        "order": torch.randperm(190, generator=torch.Generator().manual_seed(0)).int(),
        "channel_scale": torch.linspace(0.5, 2, 190).half(),
    }
    own.adopt({name: part.detach() for name, part in plain.named_parameters()} | {name: parts[name] for name in also})
    x, bias = random(3, 190).bfloat16(), random(1, 34)[0]
    for first, other in ((own, plain), (plain, own)):
        first.prepare_decoding([other])
        found = first.decode_products(x, [other], [Addition(), Addition(bias)])
        for y, weight, added in zip(found, (first, other), (0, bias), strict=True):
            assert close(y, x.double() @ weight.unpack(torch.float64).t() + added)
        lora = Addition(a=random(4, 190), b=random(34, 4))
        assert first.decode_products(x, [other], [lora, Addition()]) is None
