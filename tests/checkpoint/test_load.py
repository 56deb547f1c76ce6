"""Filling a decoder: the same model whatever it is read from, on one rank and cut over two; and every misfit named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint.load import fill, named_generator, resolve, targets
from accessory.checkpoint.naming import in_rotary_layout
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import Source, model_args_of
from accessory.errors import CheckpointError
from accessory.meta import MetaModel
from accessory.method import METHODS, Attachment
from accessory.model.decoder import Decoder
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight, storage

TOKENS = (torch.arange(40) * 7) % 500
VOCABULARY = 512


def decoder_of(source: Source, *, rank: int = 0, ranks: int = 1, quant: str | None = None) -> Decoder:
    """An empty decoder of a source's settings."""
    args = model_args_of(source).model_copy(update={"vocab_size": VOCABULARY})
    maker = storage(quant) if quant else None
    return Decoder(args, dtype=torch.float32, rank=rank, ranks=ranks, storage=maker)


def filled(source: Source, *, rank: int = 0, ranks: int = 1, quant: str | None = None, **peft) -> dict[str, Tensor]:
    """What lies in each place once `source` fills one rank's decoder (with NormBiasLoRA of `peft`, where given)."""
    decoder = decoder_of(source, rank=rank, ranks=ranks, quant=quant)
    attachment = METHODS["peft"](METHODS["peft"].Settings(**peft)).attach(decoder) if peft else Attachment()
    layout = Layout(rank=rank, world_size=ranks, mp_rank=rank, mp_size=ranks)
    tensors = resolve(decoder, [source], attachment, initialize=True)
    fill(decoder, tensors, attachment, layout, DataParallel(Layout(), "sdp", base_is_trained=False), seed=3)
    places = {target.name: getattr(target.owner, target.leaf) for target in targets(decoder)}
    return {k: v.unpack(torch.float32) if isinstance(v, PackedWeight) else v.detach() for k, v in places.items()}


def joined(parts: list[dict[str, Tensor]], decoder: Decoder) -> dict[str, Tensor]:
    """Two ranks' parameters put together as their slicing says."""
    dims = {target.name: target.slicing.dim for target in targets(decoder)}
    return {
        name: value if dims[name] is None else torch.cat([part[name] for part in parts], dims[name])
        for name, value in parts[0].items()
    }


@pytest.fixture(scope="module")
def expected_logits(tiny_base: Path) -> Tensor:
    """The Hugging Face directory's logits, by transformers."""
    model = transformers.LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS[None]).logits[0]


def test_logits_are_transformers(formats: dict[str, Path], tiny_base: Path, format_name: str, expected_logits) -> None:
    """Every format gives transformers' logits, and the very same bits as every other in the same row order."""
    ours = MetaModel.from_pretrained(formats[format_name], dtype="fp32", tokenizer_path=tiny_base)
    found = ours.logits(TOKENS, (40,))
    assert expected_logits.std() > 1
    torch.testing.assert_close(found, expected_logits, rtol=0, atol=2e-4)
    alike = formats["hf" if format_name.startswith("hf") else "meta1"]
    again = MetaModel.from_pretrained(alike, dtype="fp32", tokenizer_path=tiny_base)
    assert torch.equal(found, again.logits(TOKENS, (40,)))


def test_parameters_are_the_checkpoints(formats: dict[str, Path], weights, format_name: str) -> None:
    """Bit for bit, each in its place; and the ranks of two hold slices that make the same whole."""
    source = open_source(formats[format_name])
    weights = in_order_of(formats, weights, format_name)
    whole = filled(source)
    assert whole.keys() == weights.keys()
    assert all(torch.equal(whole[name], weight) for name, weight in weights.items())
    parts = [filled(source, rank=rank, ranks=2) for rank in range(2)]
    assert parts[0]["layers.0.attention.wq.weight"].shape == (64, 128)
    together = joined(parts, decoder_of(source, ranks=2))
    assert all(torch.equal(together[name], weight) for name, weight in weights.items())


def in_order_of(formats: dict[str, Path], weights: dict[str, Tensor], format_name: str) -> dict[str, Tensor]:
    """The weights with q's and k's rows as `format_name` has them: Hugging Face's own, elsewhere Meta's."""
    if not format_name.startswith("hf"):
        return weights
    file = load_file(formats["hf"] / "model.safetensors")
    return weights | {
        f"layers.{i}.attention.w{x}.weight": file[f"model.layers.{i}.self_attn.{x}_proj.weight"]
        for i in range(2) for x in "qk"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["hf", "meta2", "gguf"])
def test_quantized_slices_make_the_quantized_whole(formats: dict[str, Path], name: str) -> None:
    """Blocks of 64 weights lie within a rank's slice here, so that slicing and quantizing commute."""
    source = open_source(formats[name])
    whole = filled(source, quant="nf4_single")
    together = joined([filled(source, rank=rank, ranks=2, quant="nf4_single") for rank in range(2)],
                      decoder_of(source, ranks=2))  # fmt: skip
    assert all(torch.equal(value, whole[name]) for name, value in together.items())
    assert not torch.equal(whole["layers.0.attention.wq.weight"], filled(source)["layers.0.attention.wq.weight"])


def test_added_parameters_do_not_depend_on_the_layout(formats: dict[str, Path]) -> None:
    """LoRA starts from the same values on one rank and on two; A is random, B and biases are zero."""
    source = open_source(formats["hf"])
    whole = filled(source, lora_rank=4)
    parts = [filled(source, rank=rank, ranks=2, lora_rank=4) for rank in range(2)]
    decoder = decoder_of(source, ranks=2)
    METHODS["peft"](METHODS["peft"].Settings(lora_rank=4)).attach(decoder)
    assert all(torch.equal(value, whole[name]) for name, value in joined(parts, decoder).items())
    assert whole["layers.0.attention.wq.lora_a.weight"].std() > 0.01
    assert not torch.equal(whole["layers.0.attention.wq.lora_a.weight"], whole["layers.1.attention.wq.lora_a.weight"])
    assert not whole["layers.0.attention.wo.lora_b.weight"].any()


def test_parameters_survive_their_file(formats: dict[str, Path], copy, weights) -> None:
    """What was read from a memory-mapped file is a copy: the file may be written over afterwards."""
    for name in ("hf", "meta1"):
        directory = copy(formats[name])
        values = filled(open_source(directory))
        for path in [*directory.glob("*.pth"), *directory.glob("*.safetensors")]:
            with path.open("r+b") as file:
                file.write(b"\0" * path.stat().st_size)
        wanted = in_order_of(formats, weights, name)
        assert all(torch.equal(values[key], weight) for key, weight in wanted.items())
        directory.rename(directory.with_name(name))


def test_named_generators() -> None:
    """One stream for each seed and name."""
    draws = {
        (seed, name): torch.rand(3, generator=named_generator(seed, name)).tolist() for seed in (0, 1) for name in "ab"
    }
    assert len({tuple(draw) for draw in draws.values()}) == 4
    assert draws[0, "a"] == torch.rand(3, generator=named_generator(0, "a")).tolist()


def refusal(sources: list[Source], *, initialize: bool = True, **peft) -> str:
    """What `resolve` says of sources that do not fit the first one's decoder."""
    decoder = decoder_of(sources[0])
    attachment = METHODS["peft"](METHODS["peft"].Settings(**peft)).attach(decoder) if peft else Attachment()
    with pytest.raises(CheckpointError) as caught:
        resolve(decoder, sources, attachment, initialize=initialize)
    return str(caught.value)


def trained(directory: Path, state: dict[str, Tensor]) -> Source:
    """A trained part."""
    save_file(state, directory / "trainable.safetensors")
    return open_source(directory)


def test_missing_and_unexpected_names(formats: dict[str, Path], copy, weights) -> None:
    """Both lists in one message, with the path, the nearest name, and no more than eight names each."""
    directory = copy(formats["ours"])
    state = dict(weights)
    state["layers.0.attention.wqq.weight"] = state.pop("layers.0.attention.wq.weight")
    save_file(state, directory / "model.safetensors")
    message = refusal([open_source(directory)])
    assert f"{directory}: layers.0.attention.wqq.weight has no place in this model." in message
    assert "Did you mean 'layers.0.attention.wq.weight'?" in message
    assert f"{directory}: layers.0.attention.wq.weight is missing." in message
    save_file({"norm.weight": weights["norm.weight"]}, directory / "model.safetensors")
    message = refusal([open_source(directory)])
    assert "and 12 more are missing" in message
    assert message.count(".weight") == 8


def test_wrong_shape(formats: dict[str, Path], copy, weights) -> None:
    """Names the directory, the tensor and both shapes; of a vector too."""
    directory = copy(formats["ours"])
    state = weights | {"layers.1.feed_forward.w2.weight": torch.zeros(128, 255), "norm.weight": torch.zeros(127)}
    save_file(state, directory / "model.safetensors")
    message = refusal([open_source(directory)])
    assert f"{directory}: layers.1.feed_forward.w2.weight has shape (128, 255), the model (128, 256)." in message
    assert f"{directory}: norm.weight has shape (127,), the model (128,)." in message
    assert "hards" not in message


def test_missing_last_meta_shard(formats: dict[str, Path], copy) -> None:
    """Meta's names do not say how many there are; the shapes do."""
    directory = copy(formats["meta2"])
    (directory / "consolidated.01.pth").unlink()
    message = refusal([open_source(directory)])
    assert f"{directory}: layers.0.attention.wq.weight has shape (64, 128), the model (128, 128)." in message
    assert "Shards may be missing: found consolidated.00.pth." in message


def test_missing_shard_of_ours(formats: dict[str, Path], copy) -> None:
    """The tensors it held are listed."""
    directory = copy(formats["ours_sharded"])
    (directory / "model-00000.safetensors").unlink()
    assert f"{directory}: " in refusal([open_source(directory)])
    assert "are missing" in refusal([open_source(directory)])


def test_lora_of_another_rank(formats: dict[str, Path], tmp_path: Path) -> None:
    """The trained part's file, the shapes, and the flag that mends it."""
    base, name = open_source(formats["hf"]), "layers.0.attention.wq.lora_a.weight"
    message = refusal([base, trained(tmp_path, {name: torch.zeros(8, 128)})], lora_rank=4)
    assert f"{tmp_path}: {name} has shape (8, 128), the model (4, 128)." in message
    assert "--llama_config it was trained with (lora_rank, lora_targets, lora_layers)" in message


@pytest.mark.parametrize(("name", "hint"), [
    ("layers.0.attention.wq.lora_a.weight", "it was trained with (lora_rank, lora_targets, lora_layers)"),
    ("layers.0.attention.wq.bias", "--llama_type and --llama_config it was trained with (bias_tuning, scale_tuning)"),
    ("layers.0.attention.wq.scale", "--llama_type and --llama_config it was trained with (bias_tuning, scale_tuning)"),
    ("prefix_gate", "--llama_config it was trained with (prefix_layers, prefix_len, use_prefix_new_gate)"),
])  # fmt: skip
def test_trained_part_of_another_method(formats: dict[str, Path], tmp_path: Path, name: str, hint: str) -> None:
    """LoRA or biases for a model that has none."""
    message = refusal([open_source(formats["hf"]), trained(tmp_path, {name: torch.zeros(128)})])
    assert f"{tmp_path}: {name} has no place in this model." in message
    assert hint in message


def test_added_parameters_may_be_absent_only_at_the_start(formats: dict[str, Path], tmp_path: Path) -> None:
    """A model that is asked, or resumed, needs all of its trained part; a new run starts it afresh."""
    base = open_source(formats["hf"])
    message = refusal([base, trained(tmp_path, {"norm.weight": torch.ones(128)})], initialize=False, lora_rank=4)
    assert f"{formats['hf']} + {tmp_path}: layers.0.attention.wq.bias, layers.0.attention.wq.lora_a.weight, " in message
    assert "are missing" in message


def test_last_source_wins(formats: dict[str, Path], tmp_path: Path, weights) -> None:
    """A trained part lies over its base."""
    changed = weights["norm.weight"] + 1
    source, part = open_source(formats["hf"]), trained(tmp_path, {"norm.weight": changed})
    found = resolve(decoder_of(source), [source, part], Attachment(), initialize=False)
    assert torch.equal(found["norm.weight"].read(), changed)
    assert torch.equal(found["layers.0.ffn_norm.weight"].read(), weights["layers.0.ffn_norm.weight"])


def test_pretrained_model_reports_misfit(formats: dict[str, Path], copy) -> None:
    """The same through the door that demos use: settings of another width."""
    directory = copy(formats["meta1"])
    settings = json.loads((directory / "params.json").read_text()) | {"multiple_of": 512}
    (directory / "params.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"w1\.weight has shape \(256, 128\), the model \(512, 128\)"):
        MetaModel.from_pretrained(directory)


PART = {"wq": (128, 128), "wk": (64, 128), "wv": (64, 128), "wo": (128, 128)}


def part_of(base: Path, target: Path) -> Path:
    """A trained part as a run on `base` saves it: norms, biases and LoRA, with all its settings."""
    generator = torch.Generator().manual_seed(5)
    target.mkdir()
    state = {"norm.weight": 1 + 0.2 * torch.randn(128, generator=generator)}
    for i in range(2):
        for name, (rows, columns) in PART.items():
            prefix = f"layers.{i}.attention.{name}"
            state[f"{prefix}.bias"] = 0.3 * torch.randn(rows, generator=generator)
            state[f"{prefix}.lora_a.weight"] = 0.2 * torch.randn(4, columns, generator=generator)
            state[f"{prefix}.lora_b.weight"] = 0.2 * torch.randn(rows, 4, generator=generator)
        for name, rows in (("w1", 256), ("w2", 128), ("w3", 256)):
            state[f"layers.{i}.feed_forward.{name}.bias"] = 0.3 * torch.randn(rows, generator=generator)
        for name in ("attention_norm", "ffn_norm"):
            state[f"layers.{i}.{name}.weight"] = 1 + 0.2 * torch.randn(128, generator=generator)
    settings = model_args_of(open_source(base)).model_dump() | {"vocab_size": VOCABULARY, "lora_rank": 4}
    save_file(state, target / "trainable.safetensors")
    (target / "config.json").write_text(json.dumps(settings | {"lora_targets": list(PART)}))
    (target / "meta.json").write_text('{"llama_type": "llama_peft"}')
    return target


@pytest.mark.parametrize(("trained_on", "used_on"), [("meta1", "hf"), ("hf", "meta1"), ("hf", "ours")])
def test_trained_part_on_a_base_of_another_row_order(
    formats: dict[str, Path], tiny_base: Path, tmp_path: Path, trained_on: str, used_on: str
) -> None:
    """Beside the same model in Meta's order and in Hugging Face's it gives the same logits, which it changes much."""
    part = part_of(formats[trained_on], tmp_path / "part")

    def logits(*paths: Path) -> Tensor:
        return MetaModel.from_pretrained(list(paths), dtype="fp32", tokenizer_path=tiny_base).logits(TOKENS, (40,))

    wanted, found = logits(formats[trained_on], part), logits(formats[used_on], part)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert (found - logits(formats[used_on])).abs().mean() > 0.1
    turned = in_rotary_layout(open_source(part).tensors, model_args_of(open_source(part)), "halves", "pairs")
    wrong = part_of(formats[trained_on], tmp_path / "wrong")
    save_file({name: tensor.read().contiguous() for name, tensor in turned.items()}, wrong / "trainable.safetensors")
    assert (logits(formats[used_on], wrong) - wanted).abs().max() > 1e-2  # rows in another order would be seen


def test_a_start_that_is_not_the_whole_parameter(tiny_base: Path) -> None:
    """A method that makes a rank's share, of which that rank would take its share again, is told so."""
    source = open_source(tiny_base)
    decoder, layout = decoder_of(source, ranks=2), Layout(world_size=2, mp_size=2)
    bias = "layers.0.attention.wq.bias"
    decoder.layers[0].attention.wq.add_bias(torch.float32)
    attachment = Attachment({bias}, {bias: lambda generator: torch.zeros(64)})
    tensors = resolve(decoder, [source], attachment, initialize=True)
    with pytest.raises(AssertionError, match=r"starts as \(64,\); its whole shape is \(128,\)"):
        fill(decoder, tensors, attachment, layout, DataParallel(Layout(), "sdp", base_is_trained=False))
