"""PEFT adapters in and out: what PEFT itself computes is what must come out here, and the other way round."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from accessory.checkpoint.formats.peft_adapter import open_adapter
from accessory.checkpoint.formats.peft_writing import write_adapter
from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.naming import in_rotary_layout
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import Source, model_args_of
from accessory.errors import CheckpointError, ConfigError
from accessory.export import export_adapter
from accessory.meta import MetaModel
from accessory.method.peft import Peft
from accessory.model.decoder import Decoder

ROOT = Path(__file__).resolve().parents[3]
VOCABULARY = 512
TOLERANCE = 1e-5  # of the largest logit, fp32; measured: at most 1.2e-6
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.15}
MODELS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, **GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, **GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, **GROUPED, head_dim=32),
    "opt": lambda: transformers.OPTConfig(**COMMON, init_std=0.15, ffn_dim=128, word_embed_proj_dim=64),
    "bloom": lambda: transformers.BloomConfig(
        vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.15
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON, intermediate_size=128, initializer_range=0.15),
    "glm": lambda: transformers.GlmConfig(**COMMON, **GROUPED, head_dim=16, pad_token_id=0, eos_token_id=1),
}  # fmt: skip
LINEARS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "bloom": ["query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "glm": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
}
LINEARS |= {"qwen2": LINEARS["llama"], "qwen3": LINEARS["llama"]}
NORMS = {"llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
NF4_TOLERANCE = {"fp32": 1e-5, "bf16": 0.06}
"""Of the largest logit. Measured: 7.6e-7 in fp32; in bf16 0.031, where the base alone differs by 0.022 already."""
TOKENS = torch.randint(2, VOCABULARY, (24,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base_of(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a model type -> a Hugging Face directory of it, fp32, every tensor random, with a tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(MODELS[name]()).float()
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
            model.save_pretrained(made[name])
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(tiny_base / file, made[name])
        return made[name]

    return make


def theirs(base: Path, **options: Any) -> nn.Module:
    """The base as transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(base, **{"dtype": torch.float32, **options})


def logits_of(model: nn.Module) -> Tensor:
    """[T, V] fp32."""
    with torch.no_grad():
        return model(TOKENS[None]).logits[0].float()


def ours(*paths: Path, **options: Any) -> Tensor:
    """Logits of the same tokens here, [T, V]."""
    model = MetaModel.from_pretrained(list(paths), **{"dtype": "fp32", "quant": False, **options})
    return model.logits(TOKENS, (len(TOKENS),))


def distance(found: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())


def train(model: nn.Module) -> None:
    """Stands for training: every trainable tensor gets random values."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            spread = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + (0.1 if parameter.dim() == 2 else 0.3) * spread


def made_by_peft(base: Path, directory: Path, **settings: Any) -> tuple[Path, Tensor]:
    """An adapter that PEFT made of `settings` and saved, and its logits."""
    name = json.loads((base / "config.json").read_text())["model_type"]
    settings = {"target_modules": LINEARS[name], "r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(**settings))
    train(model)
    logits = logits_of(model.eval())
    model.save_pretrained(directory)
    return directory, logits


@pytest.mark.parametrize("name", MODELS)
def test_what_peft_trained_computes_the_same_here(name: str, base_of, tmp_path: Path) -> None:
    base = base_of(name)
    adapter, expected = made_by_peft(base, tmp_path / "adapter")
    assert distance(logits_of(theirs(base).eval()), expected) > 0.1  # the adapter does something
    assert distance(ours(base, adapter), expected) < TOLERANCE
    assert distance(ours(adapter), expected) < TOLERANCE  # its config names the base


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.*": 7}, "alpha_pattern": {"v_proj": 3, "o_proj": 32}},
        {"rank_pattern": {"down_proj": 8}, "use_rslora": True},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
        {"target_modules": r".*\.(0\.self_attn\.[qv]|1\.mlp\.up)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"modules_to_save": NORMS["llama"]},
        {"modules_to_save": ["layers.1.input_layernorm"], "target_modules": ["v_proj"], "lora_dropout": 0.3},
    ],
    ids=["rslora", "patterns", "rank and rslora", "layers", "regex", "all but", "norms", "one norm"],
)  # fmt: skip
def test_what_a_config_may_say(settings: dict[str, Any], base_of, tmp_path: Path) -> None:
    base = base_of("llama")
    adapter, expected = made_by_peft(base, tmp_path / "adapter", **settings)
    assert distance(ours(base, adapter), expected) < TOLERANCE
    blocks = open_adapter(adapter, open_source(base)).settings.get("lora_layers")
    assert blocks == settings.get("layers_to_transform")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["qwen2", "opt", "bloom", "gpt_neox"])
def test_biases(name: str, bias: str, base_of, tmp_path: Path) -> None:
    """ "all" trains the norms' biases too, and with norms saved whole there are two of each in the file."""
    base = base_of(name)
    extra = {"modules_to_save": ["input_layernorm"]} if name in ("bloom", "gpt_neox") else {}
    adapter, expected = made_by_peft(base, tmp_path / "adapter", bias=bias, target_modules=LINEARS[name][:1], **extra)
    assert distance(ours(base, adapter), expected) < TOLERANCE


def test_files_of_older_versions(base_of, tmp_path: Path) -> None:
    """A .bin file, names with the adapter's own in them, and a config of half the keys."""
    base = base_of("llama")
    adapter, expected = made_by_peft(base, tmp_path / "adapter", modules_to_save=["norm"])
    state = load_file(adapter / "adapter_model.safetensors")
    state = {name.replace("_A.", "_A.default.").replace("_B.", "_B.default."): t for name, t in state.items()}
    torch.save(state, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "bias", "fan_in_fan_out", "enable_lora")
    unsaid = {"rank_pattern": None, "use_rslora": None, "merge_weights": False}
    (adapter / "adapter_config.json").write_text(json.dumps({key: config.get(key) for key in kept} | unsaid))
    assert distance(ours(base, adapter), expected) < TOLERANCE


def test_settings_and_fingerprint(base_of, tmp_path: Path) -> None:
    base = open_source(base_of("qwen2"))
    adapter, _ = made_by_peft(
        base.path,
        tmp_path / "adapter",
        target_modules=["q_proj", "down_proj"],
        lora_dropout=0.25,
        rank_pattern={"q_proj": 2},
    )
    source = open_adapter(adapter, base)
    assert source.settings == {
        "lora_rank": 4, "lora_alpha": 12.0, "lora_dropout": 0.25, "lora_targets": ["w2", "wq"], "norm_tuning": False,
        "bias_tuning": False, "architecture": "qwen2", "rotary_layout": "halves",
    }  # fmt: skip
    assert (source.format, source.llama_type, source.is_delta) == ("PEFT adapter", "llama_peft", True)
    before = source.fingerprint()
    change(adapter, lora_alpha=7)
    assert open_adapter(adapter, base).fingerprint() != before


def test_a_range_is_cut_out_of_the_whole(base_of, tmp_path: Path) -> None:
    """As ranks that share the matrices read them: of factors that are padded, scaled, stacked in one, or absent."""
    base = open_source(base_of("bloom"))
    padded, _ = made_by_peft(
        base.path,
        tmp_path / "padded",
        rank_pattern={"query_key_value": 2, "0.mlp.*": 3},
        target_modules=r".*(query_key_value|0\.mlp.*h)",
    )
    blocks = exported(base.path, tmp_path / "blocks", trained_here(base.path, tmp_path / "delta", **LORA_AND_NORMS))
    for adapter in (padded, blocks):
        for name, tensor in open_adapter(adapter, base).tensors.items():
            whole = tensor.read()
            assert tensor.shape == whole.shape, name
            for dim, size in enumerate(whole.shape):
                for start, stop in ((0, size), (1, 2), (size // 2, size)):
                    found = tensor.read(dim, start, stop)
                    assert torch.equal(found, whole.narrow(dim, start, stop - start)), (name, dim, start)


def test_a_config_of_the_user_cannot_rescale_an_adapter(base_of, tmp_path: Path) -> None:
    """PEFT's own numbers mean another scale here (rslora): refused with both, and what keeps it is taken."""
    base, config = base_of("llama"), tmp_path / "lora.json"
    adapter, expected = made_by_peft(base, tmp_path / "adapter", use_rslora=True)
    for said, now in (('{"lora_alpha": 6}', "1.5"), ('{"lora_alpha": null}', "1"), ('{"lora_rank": 8}', "1.5")):
        config.write_text(said)
        with pytest.raises(ConfigError) as caught:
            ours(base, adapter, llama_config=[config])
        message = str(caught.value)
        assert message.startswith(f"{adapter}: its LoRA was trained with {{'lora_rank': 4, 'lora_alpha': 12.0}}, ")
        assert "a scale of 3; {" in message and f"makes it {now}. " in message
    upstreams = trained_here(base, tmp_path / "upstreams", lora_rank=4)[0].path  # says no alpha: a scale of 1
    stated = json.loads((upstreams / "config.json").read_text())
    (upstreams / "config.json").write_text(json.dumps({k: v for k, v in stated.items() if k != "lora_alpha"}))
    config.write_text('{"lora_alpha": 8}')
    with pytest.raises(ConfigError, match=r"'lora_alpha': None}, a scale of 1; .* makes it 2\. .* a lora_alpha of 4 "):
        ours(base, upstreams, llama_config=[config])
    config.write_text('{"lora_rank": 4, "lora_alpha": 12}')
    assert distance(ours(base, adapter, llama_config=[config]), expected) < TOLERANCE
    config.write_text('{"lora_rank": 8, "lora_alpha": 24}')
    with pytest.raises(CheckpointError, match=r"lora_a.weight has shape \(4, 64\), the model \(8, 64\).*lora_rank"):
        ours(base, adapter, llama_config=[config])
    config.write_text('{"lora_targets": ["wq"]}')
    with pytest.raises(
        CheckpointError, match=r"have no place in this model. .*\(lora_rank, lora_targets, lora_layers\)"
    ):
        ours(base, adapter, llama_config=[config])


def test_an_adapter_cannot_rescale_another(base_of, tmp_path: Path) -> None:
    """Adapters of other linears go side by side where their scales are one; peft, adding them, computes the same."""
    base, both = base_of("llama"), tmp_path / "both.json"
    both.write_text('{"lora_targets": ["wq", "wv"]}')
    query, _ = made_by_peft(base, tmp_path / "query", target_modules=["q_proj"], use_rslora=True)
    value, _ = made_by_peft(base, tmp_path / "value", target_modules=["v_proj"])
    with pytest.raises(ConfigError) as caught:
        ours(base, query, value, llama_config=[both])
    message = str(caught.value)
    assert message.startswith(
        f"{query}: its LoRA was trained with {{'lora_rank': 4, 'lora_alpha': 12.0}}, a scale of 3"
    )
    assert message.endswith("Parts of different scales do not go together; merge one into the base (tools/merge.py).")
    alike, _ = made_by_peft(base, tmp_path / "alike", target_modules=["v_proj"], use_rslora=True)
    model = peft.PeftModel.from_pretrained(theirs(base), query, adapter_name="query")
    model.load_adapter(alike, adapter_name="alike")
    model.base_model.set_adapter(["query", "alike"])
    assert distance(ours(base, query, alike, llama_config=[both]), logits_of(model)) < TOLERANCE


# --- refusals ---


def change(adapter: Path, **values: Any) -> None:
    """Say something else in adapter_config.json."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(adapter: Path, base: Path | None) -> str:
    """What is said when it is opened."""
    with pytest.raises(CheckpointError) as error:
        open_adapter(adapter, open_source(base) if base else None)
    return str(error.value)


@pytest.fixture
def adapter(base_of, tmp_path: Path) -> Path:
    """A plain adapter that a test may damage."""
    return made_by_peft(base_of("llama"), tmp_path / "adapter")[0]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, "DoRA (use_dora)"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"lora_bias": True}, "(lora_bias)"),
        ({"fan_in_fan_out": True}, "Conv1D"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"target_parameters": ["experts.weight"]}, "target_parameters"),
        ({"alora_invocation_tokens": [4]}, "activated LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "loftq"}, "'loftq', which changes the base"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config"),
    ],
)
def test_unsupported_kinds(values: dict[str, Any], said: str, adapter: Path, base_of) -> None:
    change(adapter, **values)
    message = refused(adapter, base_of("llama"))
    assert said in message
    assert "Supported: LoRA" in message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.lora_A"),
        ({"modules_to_save": ["lm_head"]}, "base_model.model.lm_head.weight"),
        ({"use_dora": True}, "DoRA"),
    ],
    ids=["embedding", "head", "whole head", "dora"],
)
def test_what_peft_can_train_and_we_cannot(settings: dict[str, Any], said: str, base_of, tmp_path: Path) -> None:
    adapter, _ = made_by_peft(base_of("llama"), tmp_path / "adapter", **settings)
    message = refused(adapter, base_of("llama"))
    assert said in message
    assert "merge_and_unload" in message


def test_targets_that_the_base_lacks(adapter: Path, base_of) -> None:
    """Lists for every kind of model are common; PEFT passes over what is not there, and so do we."""
    base = base_of("llama")
    before = open_adapter(adapter, open_source(base))
    change(adapter, target_modules=[*LINEARS["llama"], "c_attn", "query_key_value"])
    assert_equal_tensors(open_adapter(adapter, open_source(base)), before)
    save_file({}, adapter / "adapter_model.safetensors")
    assert "holds no tensors; expected the LoRA that adapter_config.json names" in refused(adapter, base)


@pytest.mark.parametrize("module", ["h.0.attn.c_attn", "layers.0.mlp.experts.3.up_proj", "layers.2.mlp.up_proj"])
def test_adapter_of_another_model(module: str, adapter: Path, base_of) -> None:
    """What it is and which base it is for; not that its kind of LoRA is not supported."""
    state = {f"base_model.model.model.{module}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    save_file(state, adapter / "adapter_model.safetensors")
    change(adapter, base_model_name_or_path="some/other")
    message = refused(adapter, base_of("llama"))
    assert f"is for another model: base_model.model.model.{module}.lora_A.weight" in message
    assert "blocks of q_proj, k_proj, v_proj, o_proj, gate_proj, down_proj, up_proj. Give the base it was" in message
    assert message.endswith("which its adapter_config.json calls 'some/other'.") and "merge_and_unload" not in message


def test_another_base(adapter: Path, base_of, tiny_base: Path) -> None:
    message = refused(adapter, base_of("bloom"))
    assert "layers.0.mlp.down_proj.lora_A.weight" in message
    assert "base of type bloom with 2 blocks" in message
    message = refused(adapter, tiny_base)
    assert "another rank or base" in message
    assert "k_proj.lora_A.weight has shape (4, 64); adapter_config.json and the base ask for (4, 128)" in message


def test_config_and_tensors_disagree(adapter: Path, base_of) -> None:
    base = base_of("llama")
    change(adapter, r=8)
    assert "k_proj.lora_A.weight has shape (4, 64); adapter_config.json and the base ask for (8, 64)" in refused(
        adapter, base
    )
    change(adapter, r=4, target_modules=["q_proj"])
    assert "which adapter_config.json does not name" in refused(adapter, base)
    change(adapter, target_modules=LINEARS["llama"], r="many")
    assert "r" in refused(adapter, base)
    change(adapter, r=4, rank_pattern={"(": 2})
    assert "not a regular expression" in refused(adapter, base)


def test_missing_parts(adapter: Path, base_of) -> None:
    base, file = base_of("llama"), adapter / "adapter_model.safetensors"
    state = load_file(file)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    save_file({key: tensor for key, tensor in state.items() if key != name}, file)
    assert f"{name} is missing" in refused(adapter, base)
    file.unlink()
    assert "adapter_model.safetensors or adapter_model.bin is missing" in refused(adapter, base)


@pytest.mark.parametrize("named", [None, "nobody/nothing"])
def test_no_base(named: str | None, adapter: Path) -> None:
    change(adapter, base_model_name_or_path=named)
    assert "give BASE first: --pretrained_path BASE" in refused(adapter, None)


# --- out again ---


def trained_here(base: Path, directory: Path, *, spread: float = 0.1, **settings: Any) -> tuple[Source, Peft.Settings]:
    """A trained part of ours, with random values, as a run leaves it on disk."""
    source = open_source(base)
    args, method = model_args_of(source), Peft.Settings(**settings)
    decoder = Decoder(args, dtype=torch.float32)
    names = Peft(method).attach(decoder).trainable
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters() if name in names}
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        centre = source.tensors[name].read().float() if "lora" not in name and name in source.tensors else 0.0
        tensors[name] = centre + spread * torch.randn(shape, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "trainable.safetensors")
    (directory / "config.json").write_text(json.dumps(args.model_dump() | method.model_dump()))
    (directory / "meta.json").write_text(json.dumps({"llama_type": f"{source.llama_type}_peft"}))
    return open_source(directory), method


def exported(base: Path, target: Path, delta: tuple[Source, Peft.Settings], **options: Any) -> Path:
    """`write_adapter` of it."""
    args = model_args_of(open_source(base))
    write_adapter(delta[0], args, delta[1], target, base_path=str(base), **options)
    return target


LORA_AND_NORMS = {"lora_rank": 3, "lora_alpha": 5.0, "bias_tuning": False}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "some",
    [{}, {"lora_targets": ["wq", "wv", "w1"]}, {"lora_targets": ["wo", "w2"], "lora_layers": "1"}],
    ids=["all", "some", "one block"],
)
def test_what_we_trained_computes_the_same_in_peft(name: str, some: dict, base_of, tmp_path: Path) -> None:
    base = base_of(name)
    settings = LORA_AND_NORMS | some
    delta = trained_here(base, tmp_path / "delta", **settings)
    adapter = exported(base, tmp_path / "adapter", delta)
    found = logits_of(peft.PeftModel.from_pretrained(theirs(base), adapter).eval())
    expected = ours(base, delta[0].path)
    assert distance(logits_of(theirs(base).eval()), expected) > 0.1
    assert distance(found, expected) < TOLERANCE
    back = open_adapter(adapter, open_source(base))
    assert_equal_tensors(back, delta[0])
    assert back.settings["lora_targets"] == sorted(delta[1].lora_targets if name in ("llama", "qwen2", "qwen3", "glm")
                                                   or some else set(delta[1].lora_targets) - {"w3"})  # fmt: skip
    assert back.settings.get("lora_layers") == delta[1].lora_layers
    assert (back.settings["lora_rank"], back.settings["lora_alpha"]) == (3, 5.0)
    assert (back.settings["norm_tuning"], back.settings["bias_tuning"]) == (True, False)


def assert_equal_tensors(found: Source, expected: Source) -> None:
    """Bit for bit, in the one rotary layout both are in."""
    assert found.rotary_layout == expected.rotary_layout
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name].read(), tensor.read()), name


@pytest.mark.parametrize("name", ["opt", "bloom", "gpt_neox"])
@pytest.mark.parametrize("rank", [2, -1], ids=["lora", "no lora"])
def test_biases_go_out(name: str, rank: int, base_of, tmp_path: Path) -> None:
    """NormBias needs LoRA of no effect in PEFT's file, which does not come back."""
    base = base_of(name)
    delta = trained_here(base, tmp_path / "delta", lora_rank=rank, lora_targets=["wq", "wk", "w2"])
    adapter = exported(base, tmp_path / "adapter", delta)
    model = peft.PeftModel.from_pretrained(theirs(base), adapter).eval()
    found = logits_of(model)
    assert distance(found, ours(base, delta[0].path)) < TOLERANCE
    back = open_adapter(adapter, open_source(base))
    assert_equal_tensors(back, delta[0])
    assert distance(ours(base, adapter), found) < TOLERANCE
    model.save_pretrained(tmp_path / "again")  # PEFT knows that they are part of it
    assert distance(ours(base, tmp_path / "again"), found) < TOLERANCE


def test_rows_in_metas_layout_go_out_in_theirs(base_of, tmp_path: Path) -> None:
    """The same trained part, its rows of q and k laid out for a base of Meta's."""
    base = base_of("qwen2")
    source, settings = trained_here(base, tmp_path / "delta", **LORA_AND_NORMS)
    args = model_args_of(open_source(base))
    turned = in_rotary_layout(source.tensors, args, "halves", "pairs")
    assert not torch.equal(
        turned["layers.0.attention.wq.lora_b.weight"].read(),
        source.tensors["layers.0.attention.wq.lora_b.weight"].read(),
    )
    meta = replace(source, tensors=turned, settings={**source.settings, "rotary_layout": "pairs"})
    adapter = exported(base, tmp_path / "adapter", (meta, settings))
    assert_equal_tensors(open_adapter(adapter, open_source(base)), source)


def test_biases_without_a_place(base_of, tmp_path: Path) -> None:
    base = base_of("qwen2")  # has biases on q, k and v
    delta = trained_here(base, tmp_path / "delta", lora_rank=2)
    with pytest.raises(CheckpointError, match=r"no bias on .*attention.wo.*feed_forward.w1.*--drop_biases"):
        exported(base, tmp_path / "adapter", delta)
    assert not (tmp_path / "adapter").exists()
    adapter = exported(base, tmp_path / "adapter", delta, drop_biases=True)
    kept = {n: t for n, t in delta[0].tensors.items() if not n.endswith(("wo.bias", "w1.bias", "w2.bias", "w3.bias"))}
    found = logits_of(peft.PeftModel.from_pretrained(theirs(base), adapter).eval())
    zeros = {n: HeldTensor(torch.zeros(t.shape)) for n, t in delta[0].tensors.items() if n not in kept}
    back = open_adapter(adapter, open_source(base))
    assert_equal_tensors(back, replace(delta[0], tensors=kept | zeros))
    assert distance(ours(base, adapter), found) < TOLERANCE
    again = exported(base, tmp_path / "again", (back, delta[1]))  # zeros are no loss
    assert (
        load_file(again / "adapter_model.safetensors").keys() == load_file(adapter / "adapter_model.safetensors").keys()
    )


def test_what_cannot_go_out(base_of, tmp_path: Path) -> None:
    base = base_of("llama")
    source, settings = trained_here(base, tmp_path / "delta", **LORA_AND_NORMS)
    extra = replace(source, tensors={**source.tensors, "tok_embeddings.weight": HeldTensor(torch.ones(2, 2))})
    with pytest.raises(CheckpointError, match=r"tok_embeddings.weight is no LoRA factor"):
        exported(base, tmp_path / "a", (extra, settings))
    with pytest.raises(CheckpointError, match=r"wq.lora_a.weight has shape \(3, 64\), expected \(8, 64\)"):
        exported(base, tmp_path / "b", (source, settings.model_copy(update={"lora_rank": 8})))
    half = {name: t for name, t in source.tensors.items() if not name.endswith("1.attention.wo.lora_b.weight")}
    with pytest.raises(CheckpointError, match=r"layers.1.attention.wo.lora_b.weight is missing"):
        exported(base, tmp_path / "c", (replace(source, tensors=half), settings))
    with pytest.raises(CheckpointError, match="new or empty directory"):
        exported(base, source.path, (source, settings))


def test_what_peft_saves_again_is_read_as_it_stands(base_of, tmp_path: Path) -> None:
    """PEFT drops our header: a fused module then has one rank for all that is in it, and means the same."""
    base = base_of("bloom")
    delta = trained_here(base, tmp_path / "delta", **LORA_AND_NORMS)
    adapter = exported(base, tmp_path / "adapter", delta)
    model = peft.PeftModel.from_pretrained(theirs(base), adapter)
    model.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "again" / "adapter_model.safetensors", "pt") as file:
        assert "accessory_parts" not in file.metadata()
    assert open_adapter(tmp_path / "again", open_source(base)).settings["lora_rank"] == 9
    assert distance(ours(base, tmp_path / "again"), ours(base, delta[0].path)) < TOLERANCE


def packed_by_bitsandbytes(base: Path, dtype: torch.dtype, nested: bool) -> nn.Module:
    """The base in NF4 as transformers and bitsandbytes load it. In train mode: eval mode repacks it on a CPU."""
    packing = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
    )
    return theirs(base, dtype=dtype, quantization_config=packing, device_map="cpu").train()


@pytest.mark.parametrize("precision", NF4_TOLERANCE)
@pytest.mark.parametrize(("name", "storage"), [("llama", "nf4"), ("gpt_neox", "nf4_single")])
def test_beside_an_nf4_base(name: str, storage: str, precision: str, base_of, tmp_path: Path) -> None:
    """bitsandbytes and PEFT against our packed weights and factors: the same codes, so only rounding is between them.

    With doubly quantized statistics that holds only where no matrix of theirs is several of ours: they share groups.
    """
    base = shutil.copytree(base_of(name), tmp_path / "base")
    theirs(base, dtype=torch.bfloat16).save_pretrained(base)  # what is packed must not be rounded first on one side
    delta = trained_here(base, tmp_path / "delta", **LORA_AND_NORMS)
    adapter = exported(base, tmp_path / "adapter", delta)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = packed_by_bitsandbytes(base, dtype, storage == "nf4")
    alone = logits_of(model)
    expected = logits_of(peft.PeftModel.from_pretrained(model, adapter).train())
    assert distance(alone, expected) > 0.3
    for part in (delta[0].path, adapter):
        found = ours(base, part, dtype=precision, quant=True, quant_type=storage)
        assert distance(found, expected) < NF4_TOLERANCE[precision]


def trained_on(base: Path, adapter: Path, out: Path, python: Callable, *flags: str) -> tuple[Path, str]:
    """What two steps of main_finetune.py upon the adapter leave behind, and what they say."""
    done = python(
        ROOT / "accessory" / "main_finetune.py",
        *("--pretrained_path", base, adapter, "--llama_type", "llama_peft", "--only_save_trainable"),
        *("--data_config", ROOT / "data_example" / "accessory_qa.json", "--device", "cpu", "--max_words", "160"),
        *("--batch_size", "4", "--accum_iter", "1", "--max_steps", "2", "--precision", "fp32"),
        *("--min_lr", "0", "--output_dir", out, *flags),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return out / "epoch0-iter2", done.stdout


def test_training_goes_on_from_an_adapter(tiny_base: Path, tmp_path: Path, python) -> None:
    """Base and adapter give everything: rank, targets, family; what it leaves behind needs neither flag."""
    settings = {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 2},
        "modules_to_save": NORMS["llama"],
    }
    adapter, _ = made_by_peft(tiny_base, tmp_path / "adapter", **settings)
    change(adapter, base_model_name_or_path="nobody/nothing")
    saved, _ = trained_on(tiny_base, adapter, tmp_path / "out", python, "--lr", "1e-6")
    expected = open_adapter(adapter, open_source(tiny_base))
    found = open_source(saved)
    assert found.settings["lora_targets"] == ["wq", "wv"]
    assert (found.settings["lora_rank"], found.settings["bias_tuning"]) == (4, False)
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        torch.testing.assert_close(tensor.read(), expected.tensors[name].read(), atol=1e-5, rtol=0)
    assert not all(torch.equal(t.read(), expected.tensors[name].read()) for name, t in found.tensors.items())
    assert distance(ours(saved), ours(tiny_base, adapter)) < 1e-3
    export_adapter([saved], tmp_path / "again", drop_biases=False)  # run.json knows base and adapter
    again = peft.PeftModel.from_pretrained(theirs(tiny_base), tmp_path / "again").eval()
    assert distance(logits_of(again), ours(saved)) < TOLERANCE


def test_what_an_adapter_lacks_learns(tiny_base: Path, tmp_path: Path, python) -> None:
    """LoRA on one linear of a block, and of a smaller rank on one: widened, it adds nothing and still learns."""
    settings = {"target_modules": r".*(0.*q_proj|1.*(q_proj|v_proj|down_proj))", "rank_pattern": {"v_proj": 2}}
    adapter, expected = made_by_peft(tiny_base, tmp_path / "adapter", **settings)
    assert distance(ours(tiny_base, adapter), expected) < TOLERANCE
    saved, said = trained_on(tiny_base, adapter, tmp_path / "out", python, "--lr", "1e-3")
    assert f"{adapter}: has no LoRA on 2 of 6 w2, wq, wv and has a rank below 4 on 1: what is missing there" in said
    before, after = open_adapter(adapter, open_source(tiny_base)).tensors, open_source(saved).tensors
    assert len(after) == 12
    for name, tensor in after.items():
        new, old = tensor.read(), before[name].read()
        pairs = 0 if name.endswith("lora_a.weight") else 1
        assert (new != old).any(1 - pairs).all(), name  # each of the rank's pairs moved
