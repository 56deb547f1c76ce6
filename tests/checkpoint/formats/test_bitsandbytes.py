"""Checkpoints that transformers and bitsandbytes packed, and ours in their layout: the bytes stay what they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint.load import targets
from accessory.checkpoint.opening import open_source
from accessory.errors import AccessoryError, CheckpointError, ConfigError
from accessory.export import Destination, open_whole
from accessory.meta import MetaModel
from accessory.quant import PackedWeight
from tests.conftest import copy_tokenizer

TOKENS = torch.arange(40) * 7 % 500
THEIRS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip


def pack(base: Path, target: Path, quant_type: str, nested: bool) -> transformers.PreTrainedModel:
    """`base` as transformers loads and saves it in 4 bits; the tokenizer goes with it."""
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    model.save_pretrained(target)
    copy_tokenizer(base, target)
    return model.train()  # in eval mode bitsandbytes repacks its weights on the CPU


@pytest.fixture(scope="module")
def packed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """(quant_type, nested) -> the tiny model packed by transformers, in a directory of its own."""
    made: dict[tuple[str, bool], Path] = {}

    def make(quant_type: str = "nf4", nested: bool = True) -> Path:
        if (quant_type, nested) not in made:
            made[quant_type, nested] = tmp_path_factory.mktemp("packed")
            pack(tiny_base, made[quant_type, nested], quant_type, nested)
        return made[quant_type, nested]

    return make


@pytest.mark.parametrize(("quant_type", "nested"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)])
def test_bytes_are_the_files(packed, quant_type: str, nested: bool) -> None:
    """Codes and both levels of statistics, for every linear; the model computes what transformers' does."""
    path = packed(quant_type, nested)
    model = MetaModel.from_pretrained(path, dtype="fp32")
    stored = load_file(path / "model.safetensors")
    checked = 0
    for target in targets(model.llma):
        weight = getattr(target.owner, target.leaf)
        if isinstance(weight, PackedWeight):
            _, number, module = target.name.removesuffix(".weight").split(".", 2)
            key = f"model.layers.{number}.{THEIRS[module]}.weight"
            assert torch.equal(weight.codes, stored[key].flatten()), key
            assert torch.equal(weight.scales, stored[f"{key}.absmax"]), key
            assert weight.nested == nested and weight.quant_type == quant_type
            if nested:
                assert torch.equal(weight.nested_scales, stored[f"{key}.nested_absmax"]), key
            checked += 1
    assert checked == 14
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map={"": "cpu"})
    with torch.no_grad():
        expected = theirs.train()(TOKENS[None]).logits[0]
    assert (model.logits(TOKENS, (40,)) - expected).abs().max() < 2e-5


def test_storage_needs_no_flag_and_refuses_another(packed) -> None:
    """The format is the file's; asking for another is an error, not a second quantization."""
    path = packed("fp4", False)
    model = MetaModel.from_pretrained(path)
    assert model.llma.layers[0].attention.wq.weight.quant_type == "fp4"
    with pytest.raises(ConfigError, match="packed as fp4_single already"):
        MetaModel.from_pretrained(path, quant=True, quant_type="nf4")


def test_linear_that_was_left_plain_stays_plain(packed, tmp_path: Path) -> None:
    """A matrix that whoever packed the base skipped is not packed here either."""
    path = Path(shutil.copytree(packed(), tmp_path / "mixed"))
    stored, key = load_file(path / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    plain = torch.randn(128, 256)
    kept = {name: tensor for name, tensor in stored.items() if not name.startswith(key)}
    save_file(kept | {key: plain}, path / "model.safetensors")
    model = MetaModel.from_pretrained(path, dtype="fp32")
    assert torch.equal(model.llma.layers[1].feed_forward.w2.weight, plain)
    assert isinstance(model.llma.layers[1].feed_forward.w1.weight, PackedWeight)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4_single"])
def test_ours_in_their_layout(tiny_base: Path, tmp_path: Path, quant_type: str) -> None:
    """transformers loads what we packed, and computes what we do from the same bytes."""
    model, _, _ = open_whole([tiny_base])
    Destination("hf", "fp32", quant_type=quant_type).write(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, device_map={"": "cpu"}
    ).train()
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
    ours = MetaModel.from_pretrained(tiny_base, dtype="fp32", quant=True, quant_type=quant_type).logits(TOKENS, (40,))
    assert (ours - expected).abs().max() < 2e-5
    assert torch.equal(MetaModel.from_pretrained(tmp_path / "hf", dtype="fp32").logits(TOKENS, (40,)), ours)


def test_packed_goes_out_as_it_came_in(packed, tmp_path: Path) -> None:
    """Relabelled as ours and back, no byte of a matrix changes."""
    model, _, _ = open_whole([packed()])
    Destination("accessory", "fp32").write(model, tmp_path / "own")
    again, _, _ = open_whole([tmp_path / "own"])
    Destination("hf", "fp32").write(again, tmp_path / "hf")
    before, after = (load_file(path / "model.safetensors") for path in (packed(), tmp_path / "hf"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if ".quant_state." in name:  # a JSON text, whose compute type we state anew
            assert state_of(tensor) | {"dtype": ""} == state_of(after[name]) | {"dtype": ""}
        else:
            assert torch.equal(tensor, after[name]), name


def state_of(tensor: Tensor) -> dict:
    """The JSON text that bitsandbytes keeps as bytes."""
    return json.loads(bytes(tensor.tolist()).decode())


def damaged(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """`path` with its tensors changed in place."""
    stored = load_file(path / "model.safetensors")
    change(stored)
    save_file(stored, path / "model.safetensors")
    return path


KEY = "model.layers.0.self_attn.v_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"


def with_state(**changes) -> Callable[[dict[str, Tensor]], None]:
    """A change of one matrix's JSON text."""

    def change(stored: dict[str, Tensor]) -> None:
        text = json.dumps(state_of(stored[STATE]) | changes)
        stored[STATE] = torch.tensor(list(text.encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.pop(f"{KEY}.absmax"), "v_proj.weight is packed, but its scales is missing"),
        (lambda stored: stored.pop(f"{KEY}.nested_absmax"), "its nested_scales is missing"),
        (
            lambda stored: stored.update({STATE: torch.zeros(8, dtype=torch.uint8)}),
            "state of .*v_proj.* cannot be read",
        ),
        (lambda stored: stored[f"{KEY}.quant_map"].mul_(0.5), "has a codebook of its own"),
        (with_state(blocksize=128), "in blocks of 128 and 256"),
        (with_state(shape=[64, 999]), r"v_proj.weight of shape \(64, 999\) has 4096 codes; expected 31968"),
        (lambda stored: stored.update({KEY: stored[KEY][:-64].clone()}), "has 4032 codes; expected 4096"),
        (
            lambda stored: stored[f"{KEY}.nested_absmax"][:1].fill_(torch.nan),
            "its nested_scales holds nan in 1 of 1 pl",
        ),
    ],
)
def test_damage_is_named(packed, copy, change: Callable, message: str) -> None:
    """Each part that is missing or strange."""
    with pytest.raises(CheckpointError, match=message):
        MetaModel.from_pretrained(damaged(copy(packed()), change))


def test_other_quantizations_are_refused(tiny_base: Path, copy) -> None:
    """By name: 8 bits, and anybody else's."""
    path = copy(tiny_base)
    config = json.loads((path / "config.json").read_text())
    for stated, said in (
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}, "quantized by 8 bits"),
        (
            {"quant_method": "quanto", "bits": 4},
            "quantized by 'quanto', which cannot be read; expected bitsandbytes, gptq, awq",
        ),
        ({"quant_method": "gptq", "bits": 4}, r"says gptq; expected tensors called \*.qweight"),
        ("awq", "quantized by 'awq'"),
    ):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
        with pytest.raises(AccessoryError, match=said):
            open_source(path)
