"""Norm, bias and LoRA tuning: names, counts, arithmetic and starting values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from pydantic import ValidationError
from torch import Tensor

from accessory.checkpoint.load import fill, named_generator, resolve, targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.errors import ConfigError
from accessory.memory.plan import parameter_counts
from accessory.method import METHODS, Attachment
from accessory.method.peft import Peft
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.sequences import Sequences
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import WHOLE, Slicing, slicing_of
from accessory.quant import storage
from tools.model_sizes import LLAMA_2

TINY = ModelArgs(dim=32, n_layers=1, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)
LINEARS = {
    "attention.wq": (32, 32), "attention.wk": (16, 32), "attention.wv": (16, 32), "attention.wo": (32, 32),
    "feed_forward.w1": (48, 32), "feed_forward.w2": (32, 48), "feed_forward.w3": (48, 32),
}  # fmt: skip
"""Name -> (outputs, inputs) of TINY's linears."""
NORMS = {"layers.0.attention_norm.weight", "layers.0.ffn_norm.weight", "norm.weight"}
BIASES = {f"layers.0.{name}.bias" for name in LINEARS}
OURS = {"q_proj": "attention.wq", "k_proj": "attention.wk", "v_proj": "attention.wv", "o_proj": "attention.wo",
        "gate_proj": "feed_forward.w1", "up_proj": "feed_forward.w3", "down_proj": "feed_forward.w2"}  # fmt: skip
"""peft's linears -> ours."""


def lora_names(linears) -> set[str]:
    """Names of the factors of TINY's `linears`."""
    return {f"layers.0.{name}.lora_{factor}.weight" for name in linears for factor in "ab"}


def attached(args: ModelArgs = TINY, ranks: int = 1, quant: str | None = None, **settings):
    """A bf16 decoder on meta with the method on it, and what was attached."""
    decoder = Decoder(args, dtype=torch.bfloat16, ranks=ranks, storage=storage(quant) if quant else None)
    return decoder, Peft(Peft.Settings(**settings)).attach(decoder)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, NORMS | BIASES),
        ({"lora_rank": 4}, NORMS | BIASES | lora_names(LINEARS)),
        ({"bias_tuning": False}, NORMS),
        ({"norm_tuning": False}, BIASES),
        ({"bias_tuning": False, "scale_tuning": True}, NORMS | {f"layers.0.{name}.scale" for name in LINEARS}),
        ({"norm_tuning": False, "bias_tuning": False, "lora_rank": 4, "lora_targets": ["wq", "w2"]},
         lora_names(["attention.wq", "feed_forward.w2"])),
    ],
)  # fmt: skip
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_names_are_llama2_accessorys(settings: dict, names: set[str], quant: str | None) -> None:
    """Every combination trains these and no others; all exist in the decoder, and what is new starts out somehow."""
    decoder, attachment = attached(quant=quant, **settings)
    assert attachment.trainable == names
    assert names <= {name for name, _ in decoder.named_parameters()}
    assert set(attachment.initial) == names - NORMS


def test_norms_of_every_kind_are_tuned() -> None:
    """LayerNorms with their biases, those of heads, those behind, and the embedding's."""
    more = {"norm": "layer", "norm_placement": "both", "qk_norm": True, "embedding_norm": True, "gated": False}
    decoder, attachment = attached(TINY.model_copy(update=more), bias_tuning=False)
    blocks = {f"layers.0.{name}norm" for name in ("attention_", "attention_post_", "ffn_", "ffn_post_")}
    both = {f"{norm}.{leaf}" for norm in blocks | {"norm", "tok_norm"} for leaf in ("weight", "bias")}
    assert attachment.trainable == both | {f"layers.0.attention.{letter}_norm.weight" for letter in "qk"}
    assert attachment.trainable <= {name for name, _ in decoder.named_parameters()}


def test_target_that_a_model_has_not() -> None:
    """w3 of a model whose feed-forward does not gate: nothing matches, and the rest is as ever."""
    _, attachment = attached(
        TINY.model_copy(update={"gated": False}), lora_rank=4, norm_tuning=False, bias_tuning=False
    )
    assert attachment.trainable == lora_names(set(LINEARS) - {"feed_forward.w3"})


@pytest.mark.parametrize(
    ("stated", "blocks"),
    [(None, range(6)), ("1-3,5", [1, 2, 3, 5]), ([5, "0-1", 1], [0, 1, 5]), (4, [4]), ("2", [2]), ([0, 1], [0, 1])],
)
def test_lora_by_layer(stated: object, blocks: list[int]) -> None:
    """Those blocks' linears have factors and no others; norms and biases are all trained."""
    args = TINY.model_copy(update={"n_layers": 6})
    decoder, attachment = attached(args, lora_rank=4, lora_layers=stated)
    with_lora = {int(name.split(".")[1]) for name, _ in decoder.named_parameters() if "lora_" in name}
    assert with_lora == {int(name.split(".")[1]) for name in attachment.trainable if "lora_" in name} == set(blocks)
    assert sum(name.endswith("norm.weight") for name in attachment.trainable) == 2 * 6 + 1
    settings = Peft.Settings(lora_rank=4, lora_layers=stated)
    assert Peft.Settings(**settings.model_dump()) == settings


def test_lora_in_a_block_that_the_base_has_not(layout: Layout) -> None:
    """Refused before it is made; without LoRA it says nothing."""
    with pytest.raises(ConfigError, match=r"'lora_layers' names 6, 7; the base has 6 blocks, 0 to 5\."):
        made = Peft(Peft.Settings(lora_rank=4, lora_layers="5-7"))
        made.check(TINY.model_copy(update={"n_layers": 6}), layout, "sdp")
    Peft(Peft.Settings(lora_layers="5-7")).check(TINY, layout, "sdp")


@pytest.mark.parametrize("wrong", ["", [], "3-1", "-1", [True], "0-9999", 1.5, "a", ["0-3", None]])
def test_wrong_layers_are_refused(wrong: object) -> None:
    """Each with what was found."""
    with pytest.raises(ValidationError, match=r"lora_layers\n.*(expected numbers of blocks|names no block)"):
        Peft.Settings(lora_rank=4, lora_layers=wrong)


def test_shapes() -> None:
    """A bias has the outputs, A [R, in], B [out, R], all fp32."""
    decoder, _ = attached(lora_rank=4)
    for name, (outputs, inputs) in LINEARS.items():
        linear = decoder.get_submodule(f"layers.0.{name}")
        assert tuple(linear.bias.shape) == (outputs,)
        assert tuple(linear.lora_a.weight.shape) == (4, inputs)
        assert tuple(linear.lora_b.weight.shape) == (outputs, 4)
        assert {p.dtype for p in (linear.bias, linear.lora_a.weight, linear.lora_b.weight)} == {torch.float32}


def test_slices_of_two_ranks() -> None:
    """Column: B is cut, A's gradient is a share. Row: A is cut, B's gradient is a share and the bias whole."""
    decoder, _ = attached(ranks=2, lora_rank=4)
    column, row = decoder.layers[0].attention.wk, decoder.layers[0].feed_forward.w2
    assert tuple(column.lora_a.weight.shape) == (4, 32)
    assert tuple(column.lora_b.weight.shape) == (8, 4)
    assert tuple(row.lora_a.weight.shape) == (4, 24)
    assert tuple(row.lora_b.weight.shape) == (32, 4)
    found = [slicing_of(p) for linear in (column, row) for p in (linear.lora_a.weight, linear.lora_b.weight)]
    assert found == [Slicing(partial=True), Slicing(dim=0), Slicing(dim=1), Slicing(partial=True)]
    assert slicing_of(column.bias) == Slicing(dim=0)
    assert slicing_of(row.bias) == WHOLE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "norm_bias", "with_lora"),
    [("7B", 1_626_112, 41_603_072), ("13B", 2_544_640, 65_131_520), ("70B", 8_036_352, 215_130_112)],
)
@pytest.mark.parametrize(("quant", "ranks"), [(None, 1), ("nf4", 8)])
def test_counts_of_llama2(size: str, norm_bias: int, with_lora: int, quant: str | None, ranks: int) -> None:
    """Published trainable counts, whatever the storage and however many ranks share the model."""
    args = ModelArgs(vocab_size=32000, **LLAMA_2[size])
    totals = {"7B": 6_738_415_616, "13B": 13_015_864_320, "70B": 68_976_648_192}
    decoder, attachment = attached(args, ranks, quant)
    biases = norm_bias - (2 * args.n_layers + 1) * args.dim
    assert parameter_counts(decoder, attachment) == (norm_bias, totals[size] + biases)
    assert parameter_counts(*attached(args, ranks, quant, lora_rank=16))[0] == with_lora


def lora_on_both(path: Path, layout: Layout, **settings) -> tuple[peft.PeftModel, Decoder]:
    """A random transformers LLaMA with peft's LoRA, and our decoder with the same weights and factors (fp32)."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(path)
    alpha = settings.get("lora_alpha") or settings["lora_rank"]
    adapter = peft.LoraConfig(r=settings["lora_rank"], lora_alpha=alpha, target_modules=list(OURS))
    theirs = peft.get_peft_model(model, adapter).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    source = open_source(path)
    decoder = Decoder(model_args_of(source), dtype=torch.float32)
    attachment = Peft(Peft.Settings(norm_tuning=False, bias_tuning=False, **settings)).attach(decoder)
    tensors = resolve(decoder, [source], attachment, initialize=True)
    attachment.initial.update(factors_of(theirs))
    fill(decoder, tensors, attachment, layout, DataParallel(layout, "sdp", base_is_trained=False))
    return theirs, decoder.eval()


def factors_of(model: peft.PeftModel, gradients: bool = False) -> dict:
    """peft's factors (or their gradients) by our names, as the makers of initial values."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        parts = name.split(".")
        layer, linear, factor = parts[parts.index("layers") + 1], parts[-4], parts[-3][-1].lower()
        value = (parameter.grad if gradients else parameter).detach().clone()
        found[f"layers.{layer}.{OURS[linear]}.lora_{factor}.weight"] = lambda _generator, value=value: value
    return found


@pytest.mark.parametrize("settings", [{"lora_rank": 4}, {"lora_rank": 4, "lora_alpha": 10.0}])
def test_lora_equals_pefts(tmp_path: Path, layout: Layout, settings: dict) -> None:
    """Logits, and the gradient of every factor, with and without a scale."""
    theirs, decoder = lora_on_both(tmp_path, layout, **settings)
    ids = torch.randint(0, 64, (15,), generator=torch.Generator().manual_seed(1))
    logits = decoder(ids, Sequences.build((15,), decoder.frequencies)) @ decoder.head_weight.t()
    wanted = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), theirs.disable_adapter():
        assert (theirs(ids[None]).logits[0] - wanted).abs().max() > 0.1  # LoRA does something
    logits.square().sum().backward()
    wanted.square().sum().backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    expected = factors_of(theirs, gradients=True)
    assert set(gradients) == set(expected)
    for name, make in expected.items():
        assert (gradients[name] - make(None)).norm() < 1e-4 * make(None).norm(), name


def test_scale() -> None:
    """alpha / R, or 1 where alpha is absent, as upstream."""
    assert Peft.Settings(lora_rank=16).lora_scale == 1.0
    assert Peft.Settings(lora_rank=16, lora_alpha=8.0).lora_scale == 0.5


def test_dropout_setting_reaches_every_factor() -> None:
    """And follows the decoder's mode."""
    decoder, _ = attached(lora_rank=4, lora_dropout=0.1)
    found = [decoder.get_submodule(f"layers.0.{name}") for name in LINEARS]
    assert all(linear.addition(None).dropout == 0.1 for linear in found)
    decoder.eval()
    assert not any(linear.addition(None).dropout for linear in found)


def test_starting_values() -> None:
    """A is truncated normal of deviation 0.02, everything else zero: at first nothing is changed."""
    args = ModelArgs(dim=256, n_layers=1, n_heads=4, hidden_dim=512, vocab_size=64)
    _, attachment = attached(args, lora_rank=16)
    for name, make in attachment.initial.items():
        value = make(named_generator(0, name))
        if ".lora_a." in name:
            assert value.std().item() == pytest.approx(0.0176, rel=0.05)  # 0.02, cut at two deviations
            assert value.abs().max() <= 0.04
            assert value.mean().abs() < 0.001
        else:
            assert not value.any()


def test_starting_values_depend_on_seed_and_name_alone() -> None:
    """Not on the number of ranks, the layers around, the storage, or which linears have LoRA; but on both of these."""
    name, other = "layers.0.attention.wq.lora_a.weight", "layers.0.attention.wk.lora_a.weight"
    deep = TINY.model_copy(update={"n_layers": 3})
    variants = [
        attached(lora_rank=4), attached(deep, lora_rank=4), attached(ranks=2, lora_rank=4),
        attached(quant="nf4", lora_rank=4, lora_targets=["wq"], bias_tuning=False),
    ]  # fmt: skip
    values = [attachment.initial[name](named_generator(7, name)) for _, attachment in variants]
    assert all(torch.equal(value, values[0]) for value in values)
    initial = variants[0][1].initial
    assert not torch.equal(initial[name](named_generator(8, name)), values[0])
    assert not torch.equal(initial[other](named_generator(7, other)), values[0])


def normal(shape: tuple[int, ...], deviation: float) -> Callable[[torch.Generator], Tensor]:
    """A maker of starting values: random, of a mean of zero."""
    return lambda generator: deviation * torch.randn(shape, generator=generator)


def test_filled_decoder_holds_the_starting_values(layout: Layout) -> None:
    """What training starts from is what the attachment said, marked as trained; the base is frozen."""
    decoder, attachment = attached(quant="nf4", lora_rank=4)
    base = {target.name: normal(target.whole_shape(1), 1.0) for target in targets(decoder)}
    everything = Attachment(attachment.trainable, {**base, **attachment.initial})
    fill(decoder, {}, everything, layout, DataParallel(layout, "sdp", base_is_trained=False), seed=3)
    parameters = dict(decoder.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == attachment.trainable
    for name, make in attachment.initial.items():
        assert torch.equal(parameters[name], make(named_generator(3, name)))


def test_a_checkpoints_own_bias_is_trained_from_where_it_is() -> None:
    """It becomes an fp32 parameter and is not started afresh."""
    args = TINY.model_copy(update={"qkv_bias": True})
    decoder, attachment = attached(args)
    assert "layers.0.attention.wq.bias" in attachment.trainable
    assert "layers.0.attention.wq.bias" not in attachment.initial
    assert decoder.layers[0].attention.wq.bias.dtype == torch.float32
    assert "layers.0.attention.wo.bias" in attachment.initial


def test_dropout_is_told() -> None:
    """Documents must not share what each drops other values of."""
    for settings, drops in (({}, False), ({"lora_dropout": 0.1}, False), ({"lora_rank": 4}, False),
                            ({"lora_rank": 4, "lora_dropout": 0.1}, True)):  # fmt: skip
        assert Peft(Peft.Settings(**settings)).drops_out == drops


@pytest.mark.parametrize("wrong", [{"lora_rnak": 4}, {"lora_dropout": 1.0}, {"lora_targets": ["wx"]}])
def test_wrong_settings_are_refused(wrong: dict) -> None:
    """Unknown keys, targets and impossible dropouts."""
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Peft.Settings(**wrong)


def test_registered() -> None:
    """`llama_peft` finds it; its base stays as it is."""
    assert METHODS["peft"] is Peft
    assert not Peft.trains_base


@pytest.mark.parametrize("more", [{"lora_rank": 0}, {"lora_rank": 4, "lora_targets": []}])
def test_training_nothing_is_refused(more: dict) -> None:
    with pytest.raises(ValueError, match="nothing would be trained"):
        Peft.Settings(norm_tuning=False, bias_tuning=False, **more)


def test_vocabulary_tuning_trains_both_matrices() -> None:
    """Embedding and head as fp32 masters, the one where they are tied; without it neither."""
    decoder, attachment = attached(vocabulary_tuning=True, norm_tuning=False, bias_tuning=False)
    assert attachment.trainable == {"tok_embeddings.weight", "output.weight"}
    assert decoder.tok_embeddings.weight.dtype == decoder.output.weight.dtype == torch.float32
    assert decoder.layers[0].attention.wq.weight.dtype == torch.bfloat16
    tied = TINY.model_copy(update={"tie_word_embeddings": True})
    assert attached(tied, vocabulary_tuning=True)[1].trainable - attached(tied)[1].trainable == {
        "tok_embeddings.weight"
    }


def test_linears_in_others_words() -> None:
    """An error for Hugging Face's name of a linear gives ours, several if theirs is fused."""
    with pytest.raises(ValidationError, match=r"q_proj, query_key_value, fc2 would be w2, wk, wq, wv"):
        METHODS["peft"].Settings(lora_rank=4, lora_targets=["wo", "q_proj", "query_key_value", "fc2"])
