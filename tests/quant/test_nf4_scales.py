"""NF4 whose scales are trained: gradients against autograd in float64; saved, resumed, merged and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from accessory.checkpoint.opening import open_source
from accessory.config import FinetuneConfig
from accessory.errors import AccessoryError, ConfigError
from accessory.export import Destination, export_adapter, merge
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from accessory.model.projection import project
from accessory.quant import nf4_scales, storage
from accessory.quant.four_bit import codebook_of
from tests.conftest import DATA

SHAPE = (40, 192)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Random normal values, fp32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed(shape: tuple[int, int] = SHAPE) -> nf4_scales.Nf4Scales:
    """Random weights, whose scales are trained."""
    weight = storage("nf4_scales")(shape)
    weight.pack(random(*shape))
    weight.scales.requires_grad_(True)
    return weight


@pytest.mark.parametrize("piece", [1, 192 * 7, 1 << 22])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_gradients_are_autograds(
    monkeypatch: pytest.MonkeyPatch, piece: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Of the scales and of x, through W = codebook[codes] * scales in float64; in one piece of dW and in several."""
    monkeypatch.setattr(nf4_scales, "PIECE", piece)
    weight = packed()
    x, dy = random(9, 192, seed=1).to(dtype).requires_grad_(), random(9, 40, seed=2).to(dtype)
    ours = torch.autograd.grad(project(x, [weight]), [x, weight.scales], [dy])
    codes = torch.stack([weight.codes >> 4, weight.codes & 15], 1).view(40, 3, 64).long()
    scales, wide = weight.scales.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    y = wide @ (codebook_of("nf4").double()[codes] * scales[:, :, None]).view(SHAPE).t()
    assert (ours[0].dtype, ours[1].dtype) == (dtype, torch.float32)
    for found, exact in zip(ours, torch.autograd.grad(y, [wide, scales], dy.double()), strict=True):
        assert (found.double() - exact).norm() < tolerance * exact.norm()


def test_nothing_is_kept_or_computed_for_scales_that_rest() -> None:
    """As of any frozen matrix."""
    weight, saved = packed(), []
    weight.scales.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        project(random(9, 192).requires_grad_(), [weight])
    assert not saved


def test_rows_that_are_no_whole_blocks_are_refused() -> None:
    """A scale cannot stand in two rows."""
    with pytest.raises(ConfigError, match="--quant_type nf4_scales: a matrix of 172 columns"):
        storage("nf4_scales")((4, 172))


def run(base: Path, output: Path, peft: dict[str, Any], **more: Any) -> Path:
    """Two steps on the example data; what they saved."""
    output.mkdir(parents=True, exist_ok=True)
    settings = output.parent / f"{output.name}.json"
    settings.write_text(json.dumps(peft))
    flags = {"max_steps": 2} | more
    finetune(FinetuneConfig(
        pretrained_path=[base], data_config=DATA, output_dir=output, llama_type="llama_peft", llama_config=[settings],
        device="cpu", max_words=160, batch_size=2, accum_iter=1, num_workers=0, lr=1e-2, warmup_epochs=0.0, quant=True,
        quant_type="nf4_scales", only_save_trainable=True, precision="fp32", **flags,
    ))  # fmt: skip
    return output / f"epoch0-iter{flags['max_steps']}"


NORMS = {"norm_tuning": True, "bias_tuning": False}
LORA = {"norm_tuning": False, "bias_tuning": False, "lora_rank": 4}
TOKENS = torch.arange(40) * 7 % 500
WQ = "layers.0.attention.wq.weight"


@pytest.fixture(scope="module")
def parts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained with norms, and with LoRA."""
    root = tmp_path_factory.mktemp("scales")
    return {"norms": run(tiny_base, root / "norms", NORMS), "lora": run(tiny_base, root / "lora", LORA)}


def logits(*paths: Path) -> Tensor:
    """In fp32."""
    return MetaModel.from_pretrained(list(paths), dtype="fp32").logits(TOKENS, (40,))


def test_scales_are_saved_and_asked(tiny_base: Path, parts: dict[str, Path]) -> None:
    """Beside what the method trains, as they are in W; asked without a flag, they count."""
    saved = load_file(parts["norms"] / "trainable.safetensors")
    started = storage("nf4_scales")((128, 128))
    started.pack(open_source(tiny_base).tensors[WQ].read())
    change = (saved[f"{WQ}.scales"] - started.scales).abs()
    assert change.shape == (128, 2) and 0 < change.max() < 0.1
    model = MetaModel.from_pretrained(parts["norms"], dtype="fp32")
    assert torch.equal(model.llma.get_submodule(WQ).scales, saved[f"{WQ}.scales"])


def test_resumed_bit_for_bit(tiny_base: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    """Two steps and two more are four."""
    shutil.copytree(parts["norms"].parent, tmp_path / "norms")
    again = run(tiny_base, tmp_path / "norms", NORMS, max_steps=4, resume="latest")
    whole = run(tiny_base, tmp_path / "whole", NORMS, max_steps=4)
    first, second = (load_file(path / "trainable.safetensors") for path in (again, whole))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("part", ["norms", "lora"])
def test_merged_answers_the_same(parts: dict[str, Path], part: str, tmp_path: Path) -> None:
    """In plain numbers."""
    merge([parts[part]], tmp_path / "out", Destination("accessory", "fp32"), base=None, drop_biases=False)
    assert (logits(tmp_path / "out") - logits(parts[part])).abs().max() < 1e-4


@pytest.mark.parametrize(("to", "kind"), [("hf", "nf4_single"), ("accessory", "nf4_scales")])
def test_exported_packed(parts: dict[str, Path], to: str, kind: str, tmp_path: Path) -> None:
    """Single-level NF4 as bitsandbytes stores it, or ours: the bits that were trained."""
    merge([parts["norms"]], tmp_path / "out", Destination(to, "fp32"), base="packed", drop_biases=False)
    assert open_source(tmp_path / "out").storage == kind
    assert torch.equal(logits(tmp_path / "out"), logits(parts["norms"]))
    if to == "hf":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            assert (theirs.train()(TOKENS[None]).logits[0] - logits(parts["norms"])).abs().max() < 1e-4


def test_what_scales_cannot_become(parts: dict[str, Path], tmp_path: Path) -> None:
    """Packed beside LoRA, or without the codes they were trained with."""
    for part, base, to, message in (
        ("lora", "packed", "hf", "has LoRA, which packed weights cannot take up"),
        ("norms", "full", "hf", "trained parts of nf4_scales weights"),
        ("norms", "packed", "gguf", "packed weights are written as accessory, hf, gptq, awq, greenbit"),
    ):
        with pytest.raises(AccessoryError, match=message):
            merge([parts[part]], tmp_path / "x.gguf", Destination(to), base=base, drop_biases=False)
    with pytest.raises(AccessoryError, match="scales"):
        export_adapter([parts["lora"]], tmp_path / "adapter", drop_biases=False)
