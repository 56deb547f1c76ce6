"""The base's own weights that learn: accumulated, resumed, loaded again, merged, by family; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.checkpoint.lazy import HeldTensor, PackedTensor
from accessory.checkpoint.merge import with_trained_parts
from accessory.checkpoint.opening import open_source
from accessory.config import FinetuneConfig
from accessory.errors import AccessoryError, CheckpointError
from accessory.export import Destination, export_adapter, merge
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from accessory.method import METHODS
from accessory.model.args import ModelArgs
from accessory.parallel import groups
from accessory.parallel.groups import Layout
from accessory.quant.groups import group_storage
from tests.conftest import DATA
from tests.memory.small_models import SHAPES, SMALL, filled, step
from tests.memory.small_models import TOKENS as COUNT
from tests.test_blueprint import draw

TOKENS = torch.arange(40) * 7 % 500
WQ = "layers.0.attention.wq.weight"
QUANT = {"quant": True, "quant_type": "int2_g64"}


def run(base: Path, output: Path, **more: Any) -> Path:
    """Four steps of two records; what they saved."""
    flags = {"max_steps": 4, "batch_size": 2, "accum_iter": 1} | more
    finetune(FinetuneConfig(
        pretrained_path=[base], data_config=DATA, output_dir=output, llama_type="llama_qsft", device="cpu",
        max_words=160, num_workers=0, lr=1e-3, warmup_epochs=0.0, only_save_trainable=True, precision="fp32",
        clip_grad=0.5, **flags,
    ))  # fmt: skip
    return max(output.glob("epoch*"), key=lambda path: path.stat().st_mtime)


def losses(part: Path) -> Tensor:
    """Of all steps."""
    return torch.tensor([json.loads(line)["loss"] for line in (part.parent / "log.jsonl").read_text().splitlines()])


def logits(*paths: Path) -> Tensor:
    """In fp32."""
    return MetaModel.from_pretrained(list(paths), dtype="fp32").logits(TOKENS, (40,))


@pytest.fixture(scope="module")
def part(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on a base that is packed while it is loaded."""
    return run(tiny_base, tmp_path_factory.mktemp("qsft") / "part", **QUANT)


def test_accumulated_is_the_same(tiny_base: Path, part: Path, tmp_path: Path) -> None:
    """Two micro-batches of one record are one of two, with the norm clipped."""
    other = run(tiny_base, tmp_path / "other", batch_size=1, accum_iter=2, **QUANT)
    torch.testing.assert_close(losses(other), losses(part), rtol=1e-4, atol=0)


def test_resumed_bit_for_bit(tiny_base: Path, part: Path, tmp_path: Path) -> None:
    """Two steps and two more are four."""
    run(tiny_base, tmp_path / "again", max_steps=2, **QUANT)
    again = run(tiny_base, tmp_path / "again", resume="latest", **QUANT)
    first, second = (load_file(path / "trainable.safetensors") for path in (again, part))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_statistics_alone_are_saved_and_asked(tiny_base: Path, part: Path) -> None:
    """Two fp32 numbers a group of every linear of the blocks; without a flag they are asked on the packed base."""
    saved = load_file(part / "trainable.safetensors")
    assert len(saved) == 2 * 7 * 2 and all(name.endswith((".weight.scales", ".weight.zeros")) for name in saved)
    started = group_storage(2, 64)((128, 128))
    started.pack(open_source(tiny_base).tensors[WQ].read())
    for name in ("scales", "zeros"):
        change = saved[f"{WQ}.{name}"] - getattr(started, name)
        assert change.shape == (128, 2) and 0 < change.abs().max() < 0.02
    weight = MetaModel.from_pretrained(part, dtype="fp32").llma.get_submodule(WQ)
    assert torch.equal(weight.scales, saved[f"{WQ}.scales"]) and torch.equal(weight.codes, started.codes)


@pytest.mark.parametrize("kind", ["dequantized", "packed"])
def test_merged(part: Path, kind: str, tmp_path: Path) -> None:
    """In plain numbers it answers the same; packed, statistics are those that were trained, rounded to fp16."""
    merge([part], tmp_path / "out", Destination("accessory", "fp32"), base=kind, drop_biases=False)
    if kind == "dequantized":
        assert (logits(tmp_path / "out") - logits(part)).abs().max() < 1e-4
        return
    written, saved = open_source(tmp_path / "out"), load_file(part / "trainable.safetensors")
    assert written.storage == "int2_g64"
    parts = written.tensors[WQ].read_packed()
    assert all(torch.equal(parts[name], saved[f"{WQ}.{name}"].half()) for name in ("scales", "zeros"))
    assert (logits(tmp_path / "out") - logits(part)).abs().max() < 0.02


def test_trained_again_on_a_packed_base(part: Path, tmp_path: Path) -> None:
    """Which needs no flag but that it is quantized; two models of the same base can be exchanged."""
    merge([part], tmp_path / "base", Destination("accessory", "fp32"), base="packed", drop_biases=False)
    again = run(tmp_path / "base", tmp_path / "again", max_steps=2, quant=True)
    model = MetaModel.from_pretrained(again, dtype="fp32")
    trained = model.logits(TOKENS, (40,))
    model.use(None)
    assert torch.equal(model.logits(TOKENS, (40,)), logits(tmp_path / "base"))
    model.use(again)
    assert torch.equal(model.logits(TOKENS, (40,)), trained) and not torch.equal(trained, logits(tmp_path / "base"))


def test_points_become_zeros_and_large_numbers_are_refused() -> None:
    """A matrix as GPTQ has it gets zeros of its own; what fp16 cannot hold is not written."""
    kind = group_storage(4, 32, ("points",))
    parts = {"codes": torch.randint(0, 256, (8, 32), dtype=torch.uint8), "scales": torch.rand(8, 2).half(),
             "points": torch.randint(0, 16, (8, 2), dtype=torch.uint8)}  # fmt: skip
    tensor = PackedTensor({name: HeldTensor(part) for name, part in parts.items()}, kind, (8, 64), "w")
    trained = {"w.scales": torch.rand(8, 2), "w.zeros": torch.rand(8, 2)}
    storage_of = METHODS["qsft"](METHODS["qsft"].Settings(tune="statistics")).storage_of
    for rounded in (True, False):
        tensors = {"w": tensor} | {name: HeldTensor(part) for name, part in trained.items()}
        found = with_trained_parts(tensors, storage_of, rounded=rounded)["w"]
        assert found.storage is group_storage(4, 32)
        weight = storage_of(kind)((8, 64))
        weight.adopt(parts)
        assert torch.allclose(weight.unpack(torch.float32), tensor.read(), atol=1e-6)
        scales, zeros = (part.half().float() if rounded else part for part in trained.values())
        numbers = torch.stack([parts["codes"] & 15, parts["codes"] >> 4], 2).view(8, 2, 32)
        assert torch.allclose(found.read(), (numbers * scales[..., None] - zeros[..., None]).view(8, 64))
    large = {"w": tensor, "w.scales": HeldTensor(torch.full((8, 2), 1e5)), "w.zeros": HeldTensor(trained["w.zeros"])}
    with pytest.raises(CheckpointError, match=r"w\.scales was trained beyond 65504, the largest float16 number"):
        with_trained_parts(large, storage_of, rounded=True)["w"].read_packed()


@pytest.mark.parametrize(("how", "layout", "said"), [
    ({}, Layout(), "--llama_type ..._qsft trains a quantized base, .*give --quant --quant_type int2_g64"),
    ({"quant_type": "nf4"}, Layout(), "it trains integers in groups, their scales and zeros .*, which nf4 has not"),
    ({"quant_type": "int4_g128"}, Layout(world_size=2, mp_size=2), "--model_parallel_size 2 cuts rows of 128 weights"),
])  # fmt: skip
def test_refused(tiny_base: Path, how: dict[str, str], layout: Layout, said: str) -> None:
    """Before any weight is read."""
    with pytest.raises(AccessoryError, match=said):
        draw(tiny_base, llama_type="llama_qsft", **how).build(layout)


def test_what_statistics_cannot_become(part: Path, tmp_path: Path) -> None:
    """An adapter, or something beside the full-precision base."""
    with pytest.raises(AccessoryError, match="quantized weights were trained, for which PEFT has no place"):
        export_adapter([part], tmp_path / "adapter", drop_biases=False)
    with pytest.raises(AccessoryError, match="trained parts of int2_g64 weights"):
        merge([part], tmp_path / "full", Destination("hf"), base="full", drop_biases=False)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_other_families(name: str) -> None:
    """All that is trained has a gradient, in bf16 as in fp32, and the loss falls."""
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        args = ModelArgs(**{**SMALL.model_dump(), **SHAPES[name]})
        how = {"args": args, "method": "qsft", "quant": "int3_g32", "dtype": dtype}
        decoder, attachment = filled(groups.start("cpu"), {"tune": "quantized", "galore_rank": 4}, **how)
        trained = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
        assert {name.rpartition(".")[2] for name in trained} == {"scales", "zeros", "displacement"}
        optimizer, found = torch.optim.AdamW(trained.values(), lr=2e-3), []
        for _ in range(8):
            optimizer.zero_grad()
            _, loss, _ = step(decoder)
            (loss / COUNT).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
            found.append(loss.item() / COUNT)
            optimizer.step()
        losses[dtype] = torch.tensor(found)
        assert found[-1] < found[0] - 0.03
    torch.testing.assert_close(*losses.values(), rtol=0.02, atol=0.02)
