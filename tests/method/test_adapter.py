"""LLaMA-Adapter as a method: what is trained, what its settings say, and checkpoints with LLaMA2-Accessory's names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from accessory.config import FinetuneConfig
from accessory.errors import CheckpointError, ConfigError
from accessory.export import Destination, export_adapter, merge
from accessory.finetuning import finetune
from accessory.memory.plan import parameter_counts
from accessory.meta import MetaModel
from accessory.method import METHODS
from accessory.model.args import ModelArgs
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import WHOLE, Slicing, slicing_of
from accessory.quant import storage
from tests.conftest import DATA
from tools.model_sizes import LLAMA_2

Adapter = METHODS["adapter"]
ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)
WITH_BIAS = ("attention.wq", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
WITH_LORA = (*WITH_BIAS, "attention.wk", "attention.wv")
"""The JSON files of LLaMA2-Accessory."""
SINGLE = {"lora_rank": -1, "bias_tuning": True, "use_prefix_new_gate": False, "prefix_layers": 30, "prefix_len": 10,
          "trainable_mode": "sg"}  # fmt: skip
MULTI = SINGLE | {"lora_rank": 16, "use_prefix_new_gate": True, "prefix_layers": 31, "trainable_mode": "mm_stage2"}


def attached(ranks: int = 1, **settings):
    """A bf16 decoder on meta, and what was attached."""
    method = Adapter(Adapter.Settings(**settings))
    decoder = method.decoder(ARGS, dtype=torch.bfloat16, ranks=ranks)
    return decoder, method.attach(decoder)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        (SINGLE | {"prefix_layers": 1}, {"prefix", "prefix_gate"}),
        (MULTI | {"prefix_layers": 1}, set()),
        (MULTI | {"prefix_layers": 1, "trainable_mode": "mm_stage1"}, {"prefix", "prefix_gate", "prefix_new_gate"}),
    ],
)
def test_what_is_trained(settings: dict, names: set[str]) -> None:
    """As upstream's modes say; wk and wv have LoRA and no bias, as it would be added to the prefix's keys too."""
    decoder, attachment = attached(**settings)
    names = (
        names | {f"layers.{i}.{norm}_norm.weight" for i in (0, 1) for norm in ("attention", "ffn")} | {"norm.weight"}
    )
    names |= {f"layers.{i}.{name}.bias" for i in (0, 1) for name in WITH_BIAS}
    if settings["lora_rank"] > 0:
        names |= {f"layers.{i}.{name}.lora_{x}.weight" for i in (0, 1) for name in WITH_LORA for x in "ab"}
    assert attachment.trainable == names
    assert ("prefix" in attachment.initial) == ("prefix" in names)  # else an earlier stage must have it
    assert tuple(decoder.prefix.shape) == (1, 1, 10, 32)
    assert [block.attention.addition is None for block in decoder.layers] == [True, False]


def test_slices_of_two_ranks() -> None:
    """Gates are cut by heads; each rank's heads give the number they share a part of its gradient."""
    decoder, attachment = attached(ranks=2, use_prefix_new_gate=True)
    assert tuple(decoder.prefix_gate.shape) == (2, 2) and tuple(decoder.prefix.shape) == (2, 1, 10, 32)
    found = [slicing_of(p) for p in (decoder.prefix, decoder.prefix_gate, decoder.prefix_new_gate)]
    assert found == [WHOLE, Slicing(dim=1), Slicing(partial=True)]
    generator = torch.Generator().manual_seed(0)
    assert 0.9 < attachment.initial["prefix"](generator).std() < 1.1
    assert not attachment.initial["prefix_gate"](generator).any()
    assert attachment.initial["prefix_new_gate"](generator).eq(1).all()


@pytest.mark.slow
def test_count_of_llama2(layout: Layout) -> None:
    """Of upstream's file on 7B: prefixes, gates, and NormBias without the biases of wk and wv."""
    method = Adapter(Adapter.Settings(**SINGLE))
    decoder = method.decoder(ModelArgs(vocab_size=32000, **LLAMA_2["7B"]), dtype=torch.bfloat16, storage=storage("nf4"))
    trained, _ = parameter_counts(decoder, method.attach(decoder))
    assert trained == 30 * 10 * 4096 + 30 * 32 + 1_626_112 - 32 * 2 * 4096 == 2_593_728


def test_wrong_settings(layout: Layout) -> None:
    """Each with what to give instead."""
    with pytest.raises(ConfigError, match="'prefix_layers' is 30, the base has 2 blocks; expected 2 or less"):
        Adapter(Adapter.Settings(**SINGLE)).check(ARGS, layout, "sdp")
    with pytest.raises(ValidationError, match="0 would be no prefix; use a --llama_type that ends in _peft"):
        Adapter.Settings(prefix_len=0)
    with pytest.raises(ValidationError, match="nothing would be trained"):
        Adapter.Settings(trainable_mode="mm_stage2", bias_tuning=False, norm_tuning=False)
    Adapter.Settings(bias_tuning=False, norm_tuning=False)
    assert Adapter(Adapter.Settings()).beside(ARGS).settings.prefix_layers == 2


def run(base: Path, *parts: Path, out: Path, steps: int = 3, **settings) -> Path:
    """Train beside an NF4 base; the directory of the last checkpoint."""
    out.mkdir()
    (out / "adapter.json").write_text(json.dumps({"prefix_layers": 1, "prefix_len": 3} | settings))
    (out / "data.json").write_text(json.dumps(json.loads(DATA.read_text())[:8]))
    config = FinetuneConfig(
        pretrained_path=[base, *parts], data_config=out / "data.json", output_dir=out, llama_type="llama_adapter",
        quant=True, only_save_trainable=True, device="cpu", max_steps=steps, epochs=steps, lr=2e-2, warmup_epochs=0,
        max_words=128, checkpointing="all", llama_config=[out / "adapter.json"], batch_size=8,
    )  # fmt: skip
    finetune(config)
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    return max(out.glob("epoch*"), key=lambda path: path.stat().st_mtime)


def test_two_stages_beside_nf4(tiny_base: Path, tmp_path: Path) -> None:
    """The second goes on from the first one's prefixes; both are asked, and neither is merged."""
    first = run(tiny_base, out=tmp_path / "first")
    saved = load_file(first / "trainable.safetensors")
    assert saved["prefix_gate"].shape == (1, 4) and saved["prefix_gate"].abs().min() > 0
    stated = json.loads((first / "config.json").read_text())
    assert (stated["prefix_layers"], stated["prefix_len"], stated["trainable_mode"]) == (1, 3, "sg")
    second = run(tiny_base, first, out=tmp_path / "second", steps=2, trainable_mode="mm_stage2", lora_rank=2)
    assert "prefix" not in load_file(second / "trainable.safetensors")
    one, other = (MetaModel.from_pretrained(path, dtype="fp32") for path in (first, second))
    assert torch.equal(one.llma.prefix_gate, saved["prefix_gate"])
    assert torch.equal(other.llma.prefix_gate, saved["prefix_gate"])
    assert not any(p.requires_grad for name, p in other.named_parameters() if "prefix" in name)
    with pytest.raises(CheckpointError, match="cannot be merged: it is a llama_adapter, prefixes are attended to"):
        merge([tiny_base, first], tmp_path / "merged", Destination(), base=None, drop_biases=False)
    with pytest.raises(CheckpointError, match=r"it is a llama_adapter, PEFT's own prefixes \(ADAPTION_PROMPT\) have"):
        export_adapter([tiny_base, first], tmp_path / "adapter", drop_biases=False)
    with pytest.raises(CheckpointError, match=r"prefix_gate are missing\..*prefix_layers, prefix_len"):
        run(tiny_base, out=tmp_path / "alone", trainable_mode="mm_stage2")


def test_upstreams_files(tiny_base: Path, tmp_path: Path) -> None:
    """What two ranks of LLaMA2-Accessory saved, gates cut by heads, computes as the part it was made from."""
    first = run(tiny_base, out=tmp_path / "first", steps=2)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    rows = {".wq.bias": 0, ".w1.bias": 0, ".w3.bias": 0, "prefix_gate": 1}
    for rank in range(2):
        state = {}
        for name, value in load_file(first / "trainable.safetensors").items():
            if name.endswith(".wq.bias"):  # the base rotates halves of a head together, theirs rotate neighbours
                value = value.view(4, 2, 16).transpose(1, 2).flatten()
            dim = next((dim for ending, dim in rows.items() if name.endswith(ending)), None)
            state[f"llma.{name}"] = value if dim is None else value.chunk(2, dim)[rank].clone()
        torch.save({"model": state}, theirs / f"consolidated.{rank:02d}-of-02.model.pth")
    tokens, how = torch.arange(40) % 500, {"dtype": "fp32", "quant": True}
    settings = {"prefix_layers": 1, "prefix_len": 3}
    loaded = MetaModel.from_pretrained([tiny_base, theirs], llama_type="llama_adapter", llama_config=[settings], **how)
    wanted = MetaModel.from_pretrained([tiny_base, first], **how)
    assert torch.equal(loaded.logits(tokens, (30, 10)), wanted.logits(tokens, (30, 10)))
