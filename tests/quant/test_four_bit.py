"""NF4 and FP4 against bitsandbytes, bit by bit."""

from __future__ import annotations

import copy

import bitsandbytes
import bitsandbytes.functional as reference
import pytest
import torch
from torch import Tensor

from accessory.kernels.addition import NOTHING
from accessory.kernels.bitsandbytes_library import plain_scales
from accessory.model.projection import project
from accessory.quant import storage, workspace
from accessory.quant.four_bit import FourBitWeight

FORMATS = {"nf4": ("nf4", True), "nf4_single": ("nf4", False), "fp4": ("fp4", True)}
"""Our name -> bitsandbytes' quant_type and compress_statistics."""
NONE = [NOTHING]
SHAPES = [(64, 128), (5, 26), (512, 320)]  # whole blocks; a last block that is not full; several blocks of scales


def matrix(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Random weights of a model's size."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02).to(dtype)


def packed(name: str, weight: Tensor) -> FourBitWeight:
    """`weight` in the storage format `name`."""
    result = storage(name)(tuple(weight.shape))
    result.pack(weight)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_and_statistics_are_bitsandbytes(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Every stored byte, and every weight read back, equals bitsandbytes'."""
    weight = matrix(shape, dtype)
    quant_type, nested = FORMATS[name]
    codes, state = reference.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=quant_type)
    ours = packed(name, weight)
    assert torch.equal(ours.codes, codes.flatten())
    assert torch.equal(ours.scales, state.absmax)
    if nested:
        assert torch.equal(ours.nested_scales, state.state2.absmax)
        assert torch.equal(ours.offset, state.offset.view(1))
    else:
        assert not hasattr(ours, "nested_scales")
    if shape[1] % 64 == 0:  # else its code for CPUs takes other scales than it packed with
        assert torch.equal(ours.unpack(dtype), reference.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", [*SHAPES, (64, 160), (48, 172), (2, 26)])
@pytest.mark.parametrize("name", [*FORMATS, "fp4_single"])
def test_unpacked_is_codebook_times_scale(name: str, shape: tuple[int, int]) -> None:
    """Blocks of 64 run across rows, in columns that are no multiple of it too."""
    ours = packed(name, matrix(shape))
    _, state = reference.quantize_4bit(matrix((1, 64)), blocksize=64, quant_type=name[:3])
    scales = plain_scales(ours.scales, *ours.as_codes().nested) if ours.nested else ours.scales
    codes = torch.stack([ours.codes >> 4, ours.codes & 15], 1).flatten()[: shape[0] * shape[1]].long()
    wanted = (state.code.double()[codes] * scales.double().repeat_interleave(64)[: len(codes)]).view(shape)
    torch.testing.assert_close(ours.unpack(torch.float32).double(), wanted, rtol=1e-6, atol=0)
    assert torch.equal(ours.unpack_to_buffer(torch.float32), ours.unpack(torch.float32))
    assert torch.equal(ours.unpack_to_buffer(torch.bfloat16), ours.unpack(torch.bfloat16))
    torch.testing.assert_close(ours.unpack(torch.bfloat16).double(), wanted, rtol=2**-8, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_is_kept_roughly(name: str) -> None:
    """The mean error is that of four bits: some 10 % of a weight's standard deviation, whichever bytes say so."""
    weight = matrix((512, 320))
    error = (packed(name, weight).unpack(torch.float32) - weight).abs().mean() / weight.std()
    assert 0.05 < error < 0.13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_product_is_linear4bit(name: str, dtype: torch.dtype) -> None:
    """Forward and backward equal `bitsandbytes.nn.Linear4bit` of the same weight."""
    weight = matrix((192, 128))
    quant_type, nested = FORMATS[name]
    module = bitsandbytes.nn.Linear4bit(
        128, 192, bias=False, compute_dtype=dtype, compress_statistics=nested, quant_type=quant_type
    )
    module.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=nested, quant_type=quant_type
    )
    module = module.to("cpu").train()  # in eval mode its CPU path repacks the weight
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    dy = torch.randn(9, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    results = []
    ours = packed(name, weight)
    for product in (module, lambda x: project(x, [ours])[0]):
        leaf = x.clone().requires_grad_()
        y = product(leaf)
        y.backward(dy)
        results.append((y, leaf.grad))
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-9}
    for theirs, found in zip(*results, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, theirs, **tolerance)


def test_bytes_per_weight() -> None:
    """Double-quantized NF4 takes 0.5159 bytes a weight, single-level 0.5625."""
    shape = (4096, 11008)
    numel = shape[0] * shape[1]
    assert storage("nf4")(shape).nbytes == numel // 2 + numel // 64 + 4 * numel // (64 * 256) + 4
    assert storage("nf4")(shape).nbytes / numel == pytest.approx(0.5159, abs=5e-5)
    assert storage("nf4_single")(shape).nbytes / numel == 0.5625


def test_slicing_commutes_with_quantizing() -> None:
    """Rows, and columns at multiples of a block, pack to slices of the whole's codes and scales (single-level)."""
    weight = matrix((32, 256))
    whole = packed("nf4_single", weight)
    codes, scales = whole.codes.view(32, 128), whole.scales.view(32, 4)
    rows, columns = packed("nf4_single", weight[8:16]), packed("nf4_single", weight[:, 64:192])
    assert torch.equal(rows.codes.view(8, 128), codes[8:16])
    assert torch.equal(rows.scales.view(8, 4), scales[8:16])
    assert torch.equal(columns.codes.view(32, 64), codes[:, 32:96])
    assert torch.equal(columns.scales.view(32, 2), scales[:, 1:3])


def test_a_transposed_view_packs_as_its_copy() -> None:
    """The values count, not how they lie in memory."""
    weight = matrix((64, 128)).t()
    assert torch.equal(packed("nf4", weight).unpack(torch.float32), packed("nf4", weight.clone()).unpack(torch.float32))
    assert (packed("nf4", weight).unpack(torch.float32) - weight).abs().mean() < 0.13 * weight.std()


def test_packing_again_replaces() -> None:
    """A second matrix leaves nothing of the first."""
    twice = packed("nf4", matrix((64, 128)))
    twice.pack(-3 * matrix((64, 128)))
    assert torch.equal(twice.unpack(torch.float32), packed("nf4", -3 * matrix((64, 128))).unpack(torch.float32))


def test_odd_rows_are_refused() -> None:
    """A row of an odd number of weights would share its last byte with the next."""
    with pytest.raises(AssertionError, match="pairs of weights; got 63"):
        storage("nf4")((4, 63))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["nf4", "nf4_single", "fp4", "fp4_single"])
def test_unpacked_to_buffer_has_the_bits_of_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    """Unpacked into shared memory by the C function, and by bitsandbytes' operation."""
    ours = packed(name, matrix((48, 192)))
    scales = plain_scales(ours.scales, *ours.as_codes().nested) if ours.nested else ours.scales
    narrow = torch.float32 if dtype == torch.float64 else dtype
    wanted = torch.ops.bitsandbytes.dequantize_4bit.default(
        ours.codes.view(-1, 1), scales, 64, ours.quant_type, (48, 192), narrow
    )
    assert torch.equal(ours.unpack_to_buffer(dtype), wanted.to(dtype))
    assert torch.equal(ours.unpack(dtype), wanted.to(dtype))


def test_later_unpacked_ones_may_overwrite(monkeypatch) -> None:
    """One memory for all; what is unpacked to keep is its own."""
    monkeypatch.setattr(workspace, "_pieces", {})
    one, other = packed("nf4", matrix((64, 128))), packed("nf4", 2 * matrix((64, 128)))
    kept, first = one.unpack(torch.bfloat16), one.unpack_to_buffer(torch.bfloat16)
    buffers = [other.unpack_to_buffer(torch.bfloat16).data_ptr() for _ in range(workspace.MOST_SLOTS)]
    assert first.data_ptr() in buffers and kept.data_ptr() not in buffers
    assert torch.equal(kept, one.unpack_to_buffer(torch.bfloat16))


needs_kernel = pytest.mark.usefixtures("needs_cpu_kernels")


@needs_kernel
@pytest.mark.parametrize("rows", [1, 5, 48])
def test_decoding(rows: int) -> None:
    """Several matrices at once: close to float64; the stored codes stay."""
    first, second = packed("nf4", matrix((64, 128))), packed("nf4", 3 * matrix((32, 128)))
    before = [p.detach().clone() for p in first.parameters()]
    first.prepare_decoding([second])
    x = torch.randn(rows, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    for found, weight in zip(first.decode_products(x, [second], NONE * 2), (first, second), strict=True):
        wanted = x.double() @ weight.unpack(torch.float64).t()
        assert (found.double() - wanted).norm() < 0.01 * wanted.norm()
    assert all(torch.equal(one, other) for one, other in zip(before, first.parameters(), strict=True))


def test_what_was_not_prepared_is_not_decoded() -> None:
    """Many rows, other dtypes, other matrices beside it, or ones that the kernel does not take."""
    first, second, odd = (packed("nf4", matrix((n, 128))) for n in (64, 32, 33))
    x = torch.ones(5, 128, dtype=torch.bfloat16)
    assert first.decode_products(x, [second], NONE * 2) is None
    first.prepare_decoding([second])
    assert first.decode_products(x, [], NONE) is None
    assert first.decode_products(x.float(), [second], NONE * 2) is None
    assert first.decode_products(torch.ones(49, 128, dtype=torch.bfloat16), [second], NONE * 2) is None
    for others in ([odd], [storage("int8")((32, 128))]):
        first.prepare_decoding(others)
        assert first.decode_products(x, others, NONE * 2) is None


@needs_kernel
def test_a_copy_of_what_was_prepared() -> None:
    """Is of the copied weights, whatever becomes of the others."""
    ours, x = packed("nf4", matrix((64, 128))), torch.ones(5, 128, dtype=torch.bfloat16)
    ours.prepare_decoding([])
    (before,), copied = ours.decode_products(x, [], NONE), copy.deepcopy(ours)
    ours.codes.data.zero_()
    assert torch.equal(copied.decode_products(x, [], NONE)[0], before)
    copied.codes.data.zero_()
    assert not torch.equal(copied.decode_products(x, [], NONE)[0], before)


@needs_kernel
@pytest.mark.parametrize("ends", ["train", "pack", "adopt"])
def test_what_was_prepared_ends(ends: str) -> None:
    """When the module is to train, or is filled anew: its addresses would be of other weights."""
    ours, x = packed("nf4", matrix((64, 128))), torch.ones(5, 128, dtype=torch.bfloat16)
    ours.eval().prepare_decoding([])
    assert ours.decode_products(x, [], NONE) is not None
    if ends == "train":
        ours.train()
    elif ends == "pack":
        ours.pack(2 * matrix((64, 128)))
    else:
        ours.adopt({name: p.data.clone() for name, p in ours.named_parameters()})
    assert ours.decode_products(x, [], NONE) is None
