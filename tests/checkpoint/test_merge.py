"""Base plus trained part, against the sums in float64, and bitsandbytes' own rounding."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from accessory.checkpoint.lazy import HeldTensor, LazyTensor, PackedTensor
from accessory.checkpoint.merge import merged, repacked, unpacked, with_lora
from accessory.errors import CheckpointError
from accessory.method.peft import Peft
from accessory.model.args import ModelArgs
from accessory.quant import storage

SETTINGS = Peft.Settings(lora_rank=3, lora_alpha=6)
WQ, WO, W1 = "layers.0.attention.wq", "layers.0.attention.wo", "layers.0.feed_forward.w1"


def held(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> HeldTensor:
    """Random values."""
    return HeldTensor(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def adapted() -> tuple[LazyTensor, Tensor]:
    """A merged [10, 8], and what it should be in float64."""
    weight, a, b = held(10, 8, dtype=torch.bfloat16), held(3, 8, seed=1), held(10, 3, seed=2)
    return with_lora(weight, a, b, 1.5), weight.value.double() + 1.5 * b.value.double() @ a.value.double()


def test_lora_is_added_in_full_precision() -> None:
    """Even to a bf16 weight: rounding is the writer's business."""
    tensor, expected = adapted()
    assert tensor.shape == (10, 8)
    assert tensor.read().dtype == torch.float32
    torch.testing.assert_close(tensor.read().double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 0, 4), (0, 3, 10), (1, 2, 7), (1, 0, 8)])
def test_ranges(dim: int, start: int, stop: int) -> None:
    """A rank's rows or columns are those of the whole."""
    tensor, expected = adapted()
    found = tensor.read(dim, start, stop).double()
    torch.testing.assert_close(found, expected.narrow(dim, start, stop - start), rtol=1e-6, atol=1e-6)


def test_chosen_rows() -> None:
    """In another rotary layout, also cut along either dimension."""
    tensor, expected = adapted()
    rows = torch.tensor([9, 2, 5, 0])
    for read, wanted in (((), expected[rows]), ((1, 3, 6), expected[rows, 3:6]), ((0, 1, 3), expected[rows][1:3])):
        torch.testing.assert_close(tensor.select(rows).read(*read).double(), wanted, rtol=1e-6, atol=1e-6)


def test_the_base_is_left_alone() -> None:
    """fp32 files are mapped into memory: reading twice adds once."""
    weight, a, b = held(10, 8), held(3, 8, seed=1), held(10, 3, seed=2)
    before, tensor = weight.value.clone(), with_lora(weight, a, b, 1.5)
    assert torch.equal(tensor.read(), tensor.read())
    assert torch.equal(weight.value, before)


def model(**more: HeldTensor) -> dict[str, HeldTensor]:
    """Base and trained part of a block, laid over each other."""
    tensors = {f"{name}.weight": held(4, 4, seed=i) for i, name in enumerate((WQ, WO, W1, "tok_embeddings"))}
    tensors |= {f"{name}.bias": held(4, seed=9) for name in (WQ, WO, W1)}
    tensors |= {f"{WQ}.lora_a.weight": held(3, 4), f"{WQ}.lora_b.weight": held(4, 3)}
    return tensors | {"norm.weight": held(4), "norm.bias": held(4), **more}


def test_what_is_in_a_merged_model() -> None:
    """LoRA goes into its matrix; norms and biases stay, and the settings say where biases are."""
    tensors = model()
    args, kept = merged(tensors, ModelArgs(dim=4, n_heads=1), SETTINGS, drop_biases=False)
    assert kept.keys() == {name for name in tensors if "lora" not in name}
    assert (args.qkv_bias, args.out_bias, args.mlp_bias) == (True, True, True)
    a, b = (tensors[f"{WQ}.lora_{x}.weight"].value.double() for x in "ab")
    expected = tensors[f"{WQ}.weight"].value.double() + 2 * b @ a  # alpha 6 / rank 3
    torch.testing.assert_close(kept[f"{WQ}.weight"].read().double(), expected, rtol=1e-6, atol=1e-6)
    untouched = kept.keys() - {f"{WQ}.weight"}
    assert all(kept[name] is tensors[name] for name in untouched)


def test_switches_follow_what_was_tuned() -> None:
    """Without biases no setting promises any."""
    tensors = {name: tensor for name, tensor in model().items() if name not in (f"{WO}.bias", f"{W1}.bias")}
    args, _ = merged(tensors, ModelArgs(dim=4, n_heads=1), SETTINGS, drop_biases=False)
    assert (args.qkv_bias, args.out_bias, args.mlp_bias) == (True, False, False)


@pytest.mark.parametrize("switch", ["qkv_bias", "out_bias", "mlp_bias", None])
def test_dropped_biases_are_those_that_training_added(switch: str | None) -> None:
    """One the base had is trained too, and stays; so does a norm's."""
    base = ModelArgs(dim=4, n_heads=1, **({switch: True} if switch else {}))
    args, kept = merged(model(), base, SETTINGS, drop_biases=True)
    owner = {"qkv_bias": {WQ}, "out_bias": {WO}, "mlp_bias": {W1}, None: set()}[switch]
    assert {name for name in kept if name.endswith("bias")} == {"norm.bias"} | {f"{name}.bias" for name in owner}
    assert [getattr(args, name) for name in ("qkv_bias", "out_bias", "mlp_bias")] == [
        switch == "qkv_bias", switch == "out_bias", switch == "mlp_bias"
    ]  # fmt: skip


@pytest.mark.parametrize("factor", ["lora_a", "lora_b"])
def test_half_a_lora_is_refused(factor: str) -> None:
    """By the name of its matrix."""
    tensors = model()
    del tensors[f"{WQ}.{factor}.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wq: has only one of lora_a and lora_b"):
        merged(tensors, ModelArgs(dim=4, n_heads=1), SETTINGS, drop_biases=False)


def rounded(weight: Tensor, quant_type: str, nested: bool) -> Tensor:
    """What bitsandbytes leaves of a matrix; in one row, as its code for CPUs unpacks rows of broken blocks wrongly."""
    row = weight.view(1, -1)
    codes, state = bnb.quantize_4bit(row, blocksize=64, compress_statistics=nested, quant_type=quant_type)
    return bnb.dequantize_4bit(codes, state).float().view(weight.shape)


@pytest.mark.parametrize("name", ["nf4", "nf4_single", "fp4", "fp4_single"])
def test_repacked_is_bitsandbytes_rounding(name: str) -> None:
    """Bit for bit, the whole and ranges that go through blocks."""
    inner, key = held(96, 80), f"{WQ}.weight"
    tensor, expected = unpacked(repacked({key: inner}, name))[key], rounded(inner.value, name[:3], "_" not in name)
    assert tensor.shape == (96, 80)
    assert torch.equal(tensor.read(), expected)
    assert torch.equal(tensor.read(0, 5, 31), expected[5:31])
    assert torch.equal(tensor.read(1, 7, 33), expected[:, 7:33])
    assert torch.equal(tensor.select(torch.tensor([90, 3])).read(), expected[[90, 3]])
    assert not torch.equal(expected, inner.value)


def test_only_the_blocks_matrices_are_repacked() -> None:
    """Embedding, head, norms and what was trained are as they were."""
    tensors = {**model(), "output.weight": held(64, 64), f"{WQ}.weight": held(64, 64, seed=5)}
    found = repacked(tensors, "nf4")
    changed = {name for name in found if found[name] is not tensors[name]}
    assert changed == {f"{name}.weight" for name in (WQ, WO, W1)}
    assert torch.equal(found[f"{WQ}.weight"].read(), rounded(tensors[f"{WQ}.weight"].value, "nf4", True))


def test_unpacked_is_plain() -> None:
    """A packed matrix in numbers, whole, in ranges and in chosen rows; no writer takes it for one to keep packed."""
    matrix = storage("nf4")((64, 128))
    matrix.pack(held(64, 128).value)
    parts = {part: HeldTensor(value.data) for part, value in matrix.named_parameters()}
    tensors = {f"{WQ}.weight": PackedTensor.of(parts, storage("nf4"), (64, 128), "wq"), "norm.weight": held(4)}
    found, expected = unpacked(tensors), rounded(held(64, 128).value, "nf4", True)
    plain = found[f"{WQ}.weight"]
    assert found["norm.weight"] is tensors["norm.weight"]
    assert not isinstance(plain, PackedTensor) and (plain.shape, plain.dtype) == ((64, 128), "float32")
    rows = torch.tensor([60, 1, 2])
    assert not isinstance(plain.select(rows), PackedTensor)
    assert torch.equal(plain.read(), expected)
    assert torch.equal(plain.read(1, 64, 128), expected[:, 64:])
    assert torch.equal(plain.select(rows).read(), expected[rows])
