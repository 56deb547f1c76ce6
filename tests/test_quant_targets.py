"""--quant_targets: which linears are packed, in training, when the part is loaded again, and when it is merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accessory.blueprint import make_blueprint
from accessory.checkpoint.opening import open_source
from accessory.config import FinetuneConfig
from accessory.errors import CheckpointError, ConfigError
from accessory.export import Destination, logit_error, merge, open_base
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight
from tests.conftest import DATA

ALL = {"wq", "wk", "wv", "wo", "w1", "w2", "w3"}
LORA = {"lora_rank": 4, "lora_targets": ["wq", "wv"]}
TOKENS = torch.arange(40) * 7 % 500


def drawn(base: Path, *aimed: str, llama_type: str = "llama_peft", settings: dict = LORA):
    """A blueprint in NF4."""
    how = {"precision": "fp32", "train": True, "llama_type": llama_type, "quant": True}
    return make_blueprint([open_source(base)], llama_config=[settings], quant_targets=aimed, **how)


@pytest.mark.parametrize(
    ("aimed", "packed"),
    [
        ((), ALL),
        (("frozen",), ALL - {"wq", "wv"}),
        (("lora",), {"wq", "wv"}),
        (("frozen", "lora"), ALL),
        (("w1", "w2", "w3"), {"w1", "w2", "w3"}),
        (("lora", "wo"), {"wq", "wv", "wo"}),
    ],
)
def test_what_is_packed(tiny_base: Path, aimed: tuple[str, ...], packed: set[str]) -> None:
    """In every block; the others are plain, in the precision of the run."""
    blueprint = drawn(tiny_base, *aimed)
    decoder, _ = blueprint.build(Layout())
    for name, module in decoder.named_modules():
        if name.startswith("layers.") and name.rsplit(".", 1)[-1] in ALL:
            assert isinstance(module.weight, PackedWeight) == (name.rsplit(".", 1)[-1] in packed), name
            assert isinstance(module.weight, PackedWeight) or module.weight.dtype == torch.float32
    assert {name.split(".")[-2] for name in blueprint.packed_as("nf4")} == packed


def test_by_layer_and_in_a_tail(tiny_base: Path) -> None:
    """LoRA in one block, by either method: `frozen` is the other one."""
    tail = drawn(tiny_base, "frozen", llama_type="llama_qst", settings={"side_layers": 0, "tail": 1})
    for blueprint in (drawn(tiny_base, "frozen", settings={"lora_rank": 4, "lora_layers": [1]}), tail):
        assert {name.split(".")[1] for name in blueprint.packed_as("nf4")} == {"0"}


def test_what_cannot_be(tiny_base: Path, tmp_path: Path) -> None:
    """Nothing to pack, and a base that is packed already."""
    with pytest.raises(ConfigError, match=r"^--quant_targets lora: no linear of the model is one of these\.$"):
        drawn(tiny_base, "lora", settings={}).build(Layout())
    packed = tmp_path / "packed"
    Destination(quant_type="nf4").write(open_base([tiny_base])[0], packed)
    with pytest.raises(ConfigError, match=r"^--quant_targets frozen: .*packed is packed already"):
        drawn(packed, "frozen")


def test_what_is_trained_is_loaded_and_merged_as_it_was(tiny_base: Path, tmp_path: Path) -> None:
    """run.json says which linears were packed."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(json.loads(DATA.read_text())[:4]))
    settings = {"lora_rank": 4, "lora_targets": ["wq", "wv"], "bias_tuning": False}
    (tmp_path / "lora.json").write_text(json.dumps(settings))
    model = finetune(FinetuneConfig(
        pretrained_path=[tiny_base], data_config=data, output_dir=tmp_path / "out", llama_type="llama_peft",
        llama_config=[tmp_path / "lora.json"], quant=True, quant_targets=["frozen"], only_save_trainable=True,
        device="cpu", precision="fp32", epochs=2, batch_size=4, accum_iter=1, num_workers=0, lr=1e-2,
        warmup_epochs=0.0, max_words=128,
    ))  # fmt: skip
    part = max((tmp_path / "out").glob("epoch*"))
    loaded = MetaModel.from_pretrained(part, dtype="fp32")
    assert torch.equal(loaded.logits(TOKENS, (40,)), model.eval().logits(TOKENS, (40,)))
    whole = MetaModel.from_pretrained([tiny_base, part], dtype="fp32", quant=False)
    assert (whole.logits(TOKENS, (40,)) - loaded.logits(TOKENS, (40,))).abs().max() > 1e-3
    merge([part], tmp_path / "merged", Destination("accessory", "fp32"), base=None, drop_biases=False)
    assert logit_error([part], tmp_path / "merged", precision="fp32").largest < 1e-4
    with pytest.raises(ConfigError, match=r"trained with --quant_targets frozen, loaded is a base with .all."):
        MetaModel.from_pretrained(tiny_base, dtype="fp32", quant=True).use(part)
    run = json.loads((part / "run.json").read_text())
    run["arguments"]["quant_targets"] = ["everything"]
    (part / "run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=r"says quant_targets .'everything'.; expected some of frozen, lora, wq"):
        MetaModel.from_pretrained(part, dtype="fp32")
