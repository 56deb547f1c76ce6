"""What to build: settings merged from files, types and combinations checked before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accessory.blueprint import Blueprint, make_blueprint
from accessory.checkpoint.opening import open_source
from accessory.errors import AccessoryError, ConfigError, TokenizerError
from accessory.export import Destination, convert
from accessory.meta import MetaModel
from accessory.method.full import Full
from accessory.method.peft import Peft
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight
from tests.conftest import copy_tokenizer


def draw(*paths: Path, **options) -> Blueprint:
    """A blueprint of checkpoints, for training unless said otherwise."""
    defaults = {
        "llama_type": "llama_peft", "llama_config": [], "tokenizer_path": None, "quant_type": None, "precision": "bf16",
        "train": True,
    }  # fmt: skip
    return make_blueprint([open_source(path) for path in paths], **{**defaults, **options})


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Path]:
    """Keys -> a JSON file of them."""

    def write(name: str = "settings.json", **keys: object) -> Path:
        (tmp_path / name).write_text(json.dumps(keys))
        return tmp_path / name

    return write


@pytest.fixture
def meta(tiny_base: Path, tmp_path: Path) -> Callable[..., Path]:
    """params.json's keys (none: no such file) -> a directory as Meta's: an embedding, and a norm for each block."""

    def write(tokenizer: bool = True, rows: int = 512, blocks: int | None = None, **keys: object) -> Path:
        directory = tmp_path / "meta"
        directory.mkdir()
        count = keys.get("n_layers", 32) if blocks is None else blocks
        state = {f"layers.{i}.attention_norm.weight": torch.zeros(64) for i in range(count)}
        torch.save(state | {"tok_embeddings.weight": torch.zeros(rows, 64)}, directory / "consolidated.00.pth")
        if keys:
            (directory / "params.json").write_text(json.dumps(keys))
        if tokenizer:
            copy_tokenizer(tiny_base, directory)
        return directory

    return write


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A trained part that says of which type and rank it is."""
    directory = tmp_path / "part"
    directory.mkdir()
    save_file({"norm.weight": torch.ones(128)}, directory / "trainable.safetensors")
    (directory / "meta.json").write_text('{"llama_type": "llama_peft"}')
    (directory / "config.json").write_text('{"lora_rank": 8, "lora_alpha": 4, "max_seq_len": 99}')
    return directory


def test_settings_come_from_the_checkpoint(tiny_base: Path) -> None:
    """Without any file of settings; the tokenizer too."""
    blueprint = draw(tiny_base, precision="fp32")
    args = blueprint.args
    assert (args.dim, args.n_layers, args.n_kv_heads, args.hidden_dim, args.vocab_size) == (128, 2, 2, 256, 512)
    assert blueprint.tokenizer.vocab_size == 512
    assert isinstance(blueprint.method, Peft) and blueprint.dtype == torch.float32 and blueprint.train


def test_last_value_of_a_key_wins(tiny_base: Path, settings) -> None:
    """Over several files, model's and method's keys mixed, each file over the checkpoint's own."""
    first = settings("a.json", lora_rank=4, lora_alpha=8, max_seq_len=64, norm_eps=0.5)
    second = settings("b.json", lora_rank=16, max_seq_len=32)
    blueprint = draw(tiny_base, llama_config=[first, second])
    assert (blueprint.method.settings.lora_rank, blueprint.method.settings.lora_alpha) == (16, 8)
    assert (blueprint.args.max_seq_len, blueprint.args.norm_eps, blueprint.args.dim) == (32, 0.5, 128)
    assert draw(tiny_base, llama_config=[second, first]).method.settings.lora_rank == 4


def test_trained_part_brings_its_settings(tiny_base: Path, part: Path, settings) -> None:
    """Type and method's settings, over the base's; a given file and type over both."""
    blueprint = draw(tiny_base, part, llama_type=None, train=False)
    assert blueprint.llama_type == "llama_peft"
    assert (blueprint.method.settings.lora_rank, blueprint.args.max_seq_len, blueprint.args.dim) == (8, 99, 128)
    assert draw(tiny_base, part, llama_config=[settings(lora_rank=2)]).method.settings.lora_rank == 2
    assert isinstance(draw(tiny_base, part, llama_type="llama").method, Full)
    assert draw(tiny_base, llama_type=None).llama_type == "llama"


def test_settings_are_what_a_checkpoint_holds(tiny_base: Path, settings, meta) -> None:
    """`settings()` written beside a model gives the same blueprint again."""
    blueprint = draw(tiny_base, llama_config=[settings(lora_rank=4, rope_scaling=0.25)])
    again = draw(meta(**json.loads(json.dumps(blueprint.settings()))))
    assert again.args == blueprint.args
    assert again.method.settings == blueprint.method.settings


def test_unknown_keys(tiny_base: Path, settings) -> None:
    """All of all files, each with its file and the nearest name; a method's keys belong to that method."""
    first, second = settings("a.json", lora_rnk=4, dimm=3), settings("b.json", zzz=1)
    with pytest.raises(ConfigError) as caught:
        draw(tiny_base, llama_config=[first, second])
    assert str(caught.value).splitlines() == [
        f"{first}: unknown key 'lora_rnk'. Did you mean 'lora_rank'?",
        f"{first}: unknown key 'dimm'. Did you mean 'dim'?",
        f"{second}: unknown key 'zzz'.",
    ]
    with pytest.raises(
        ConfigError, match=r"a\.json: unknown key 'lora_rank': it goes with a --llama_type that ends in _p"
    ):
        draw(tiny_base, llama_type="llama", llama_config=[settings("a.json", lora_rank=4)])


def test_keys_of_others(tiny_base: Path, settings) -> None:
    """For keys of peft and of config.json the error gives our names, not those that look alike."""
    path = settings(r=4, target_modules=["q_proj"], hidden_size=128)
    with pytest.raises(ConfigError) as caught:
        draw(tiny_base, llama_config=[path])
    assert str(caught.value).splitlines() == [
        f"{path}: unknown key 'r': LoRA's rank is --lora_r, or \"lora_rank\" in a JSON file of --llama_config.",
        f"{path}: unknown key 'target_modules': LoRA's linears are \"lora_targets\" in a JSON file of --llama_config: "
        "wq, wk, wv, wo (q_proj, k_proj, v_proj, o_proj), w1, w2, w3 (gate_proj, down_proj, up_proj); absent: all.",
        f"{path}: unknown key 'hidden_size': it is \"dim\" here; or give the whole config.json, with its model_type.",
    ]


def test_settings_as_flags(tiny_base: Path, settings) -> None:
    """They are the method's, as a file would state them; what they contradict is named."""
    flags = {"lora_rank": ("--lora_r", 4), "lora_alpha": ("--lora_alpha", 8.0)}
    made = draw(tiny_base, flag_settings=flags)
    alone = {"norm_tuning": False, "bias_tuning": False}  # as qlora and peft train it
    assert made.method.settings == Peft.Settings(lora_rank=4, lora_alpha=8.0, **alone)
    with_norms = draw(tiny_base, llama_config=[settings(norm_tuning=True)], flag_settings=flags).method.settings
    assert with_norms.norm_tuning and not with_norms.bias_tuning
    assert made.settings()["lora_rank"] == 4
    file = settings(lora_rank=4)
    with pytest.raises(ConfigError, match=rf"^--lora_r: {file} has 'lora_rank' already; leave one out.$"):
        draw(tiny_base, llama_config=[file], flag_settings=flags)
    with pytest.raises(ConfigError, match=r"^--lora_r: it goes with a --llama_type that ends in _peft\."):
        draw(tiny_base, llama_type="llama_qst", flag_settings=flags)
    with pytest.raises(ConfigError, match=r"^--lora_alpha without LoRA changes nothing: give --lora_r\.$"):
        draw(tiny_base, flag_settings={"lora_alpha": ("--lora_alpha", 8.0)})


def test_a_hugging_face_config_as_settings(tiny_base: Path, tmp_path: Path) -> None:
    """It also describes Meta's files without params.json; the rotary layout stays that of the weights."""
    convert([tiny_base], tmp_path / "meta", Destination("meta", dtype="fp32"))
    (tmp_path / "meta" / "params.json").unlink()
    tokens = torch.arange(20)
    expected = MetaModel.from_pretrained(tiny_base, dtype="fp32", device="cpu").logits(tokens, (20,))
    described = MetaModel.from_pretrained(
        tmp_path / "meta", llama_config=tiny_base / "config.json", tokenizer_path=tiny_base, dtype="fp32", device="cpu"
    )
    torch.testing.assert_close(described.logits(tokens, (20,)), expected, rtol=0, atol=1e-5)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"--llama_config .*config.json: model_type 'gpt2' is not supported"):
        draw(tiny_base, llama_config=[tmp_path / "config.json"])


def test_bad_values(tiny_base: Path, settings, meta) -> None:
    """Of model and method at once, with the files they may come from."""
    path = settings(dim="wide", lora_dropout=2, lora_targets=["wq", "wz"])
    with pytest.raises(ConfigError) as caught:
        draw(tiny_base, llama_config=[path])
    message = str(caught.value)
    assert f"{tiny_base} + {path}: 'dim' is 'wide'" in message
    assert "'lora_dropout' is 2: Input should be less than 1" in message and "'lora_targets.1' is 'wz'" in message
    directory = meta(dim=64, n_heads="many")
    with pytest.raises(ConfigError, match=f"{directory}: 'n_heads' is 'many'"):
        draw(directory)


def test_file_that_is_no_json(tiny_base: Path, tmp_path: Path) -> None:
    """Named for what it is."""
    (tmp_path / "a.json").write_text("lora_rank: 4")
    with pytest.raises(AccessoryError, match=r"a\.json: found a text file of 12 bytes; expected a JSON object"):
        draw(tiny_base, llama_config=[tmp_path / "a.json"])


def test_unknown_type(tiny_base: Path) -> None:
    """With the nearest one and all known."""
    with pytest.raises(ConfigError) as caught:
        draw(tiny_base, llama_type="lama_peft")
    assert str(caught.value) == (
        "--llama_type 'lama_peft' is not supported. Did you mean 'llama_peft'? Known: llama, llama_peft, "
        "llama_adapter, llama_qst, llama_qsft, opt, opt_peft, opt_adapter, opt_qst, opt_qsft, bloom, bloom_peft, "
        "bloom_adapter, bloom_qst, bloom_qsft, neox, neox_peft, neox_adapter, neox_qst, neox_qsft, glm, glm_peft, "
        "glm_adapter, glm_qst, glm_qsft, llama_qformerv2, llama_qformerv2_peft."
    )


@pytest.mark.parametrize(("asked", "said"), [
    ("mistral_peft", "Use --llama_type llama_peft: mistral is of the family llama."),
    ("Qwen2.5-7B_lora", "Use --llama_type llama_peft: qwen2 is of the family llama."),
    ("gpt_neox", "Use --llama_type neox: gpt_neox is of the family neox."),
    ("chatglm_qlora", "Use --llama_type glm_peft: chatglm is of the family glm."),
    ("llama_ens_peft", "There is no 'ens' yet, only all weights (llama); norms, biases and LoRA"),
    ("opt_qformerv2_peft", "Images go with llama_qformerv2, llama_qformerv2_peft."),
    ("llama_qformerv2_qst", "Images go with llama_qformerv2, llama_qformerv2_peft."),
    ("llama_clip_peft", "CLIP is not named there: give its directory with --vision_path."),
    ("falcon_peft", "is not supported. Known: llama, "),
])  # fmt: skip
def test_type_of_another_name(tiny_base: Path, asked: str, said: str) -> None:
    """The error names the model's family, not one that is spelled alike."""
    with pytest.raises(ConfigError) as caught:
        draw(tiny_base, llama_type=asked)
    assert said in str(caught.value)


def test_quantized_full_training_is_refused(tiny_base: Path) -> None:
    """Weights of 4 bits have no gradient; but such a model may be asked, and then all its linears are packed."""
    with pytest.raises(ConfigError) as caught:
        draw(tiny_base, llama_type="llama", quant_type="nf4")
    assert (
        "--quant with --llama_type llama: nf4 weights cannot be trained; use --llama_type llama_peft or llama_adapter "
        "or llama_qst." in (str(caught.value))
    )
    decoder, attachment = draw(tiny_base, llama_type="llama", quant_type="nf4", train=False).build(Layout())
    packed = [name for name, module in decoder.named_modules() if isinstance(module, PackedWeight)]
    assert len(packed) == 2 * 7
    assert not attachment.trainable and not attachment.initial


def test_what_is_built(tiny_base: Path, lora_config: Path) -> None:
    """On the meta device: fp32 masters of what is trained, the rest in the compute precision; a rank's share."""
    decoder, attachment = draw(tiny_base, llama_config=[lora_config]).build(Layout())
    assert {p.device.type for p in decoder.parameters()} == {"meta"}
    kinds = {name: p.dtype for name, p in decoder.named_parameters()}
    assert all(kinds[name] == torch.float32 for name in attachment.trainable)
    assert kinds["layers.0.attention.wq.weight"] == torch.bfloat16
    assert "layers.0.attention.wq.lora_a.weight" in attachment.trainable
    full, everything = draw(tiny_base, llama_type="llama").build(Layout())
    assert everything.trainable == {name for name, _ in full.named_parameters()}
    assert {p.dtype for p in full.parameters()} == {torch.float32}
    asked, nothing = draw(tiny_base, llama_type="llama", train=False).build(Layout())
    assert not nothing.trainable and asked.head_weight.dtype == torch.bfloat16
    half, _ = draw(tiny_base).build(Layout(world_size=2, mp_rank=1, mp_size=2))
    assert half.layers[0].attention.wq.weight.shape == (64, 128)
    with pytest.raises(AccessoryError, match="--model_parallel_size 3 does not divide this model's 4 attention heads"):
        draw(tiny_base).build(Layout(world_size=3, mp_size=3))


def test_missing_settings(meta, settings) -> None:
    """A checkpoint without params.json needs them from a file."""
    directory = meta(blocks=1)
    with pytest.raises(ConfigError) as caught:
        draw(directory)
    assert f"{directory}: holds no config.json or params.json; give the model's settings with --llama_config." in (
        str(caught.value)
    )
    keys = {"dim": 64, "n_layers": 1, "n_heads": 4, "vocab_size": -1, "multiple_of": 32}
    args = draw(directory, llama_config=[settings(**keys)]).args
    assert (args.dim, args.hidden_dim, args.vocab_size) == (64, 192, 512)


def test_missing_tokenizer(meta, tiny_base: Path) -> None:
    """Named where it was looked for; --tokenizer_path mends it."""
    directory = meta(tokenizer=False, dim=64)
    with pytest.raises(TokenizerError) as caught:
        draw(directory)
    assert f"{directory}: holds no tokenizer (tokenizer.json, tokenizer.model, ...); give --tokenizer_path." in (
        str(caught.value)
    )
    assert draw(directory, tokenizer_path=tiny_base).tokenizer.vocab_size == 512
    assert draw(directory, tokenizer_path=tiny_base / "tokenizer.json").tokenizer.vocab_size == 512


@pytest.mark.parametrize("rows", [511, 512 + 1025])
def test_foreign_vocabulary(meta, rows: int) -> None:
    """A tokenizer with an ordinary token beyond the embedding's rows, or with far fewer tokens."""
    directory = meta(dim=64, rows=rows)
    with pytest.raises(TokenizerError) as caught:
        draw(directory)
    assert f"The tokenizer has 512 tokens, the model's embedding {rows} rows" in str(caught.value)
    assert "--tokenizer_path" in str(caught.value)


def test_padded_vocabulary(meta) -> None:
    """Rows beyond the tokenizer's are padding, and count for the model."""
    blueprint = draw(meta(dim=64, rows=576))
    assert blueprint.args.vocab_size == 576
    assert blueprint.notes == ("the embedding has 576 rows for 512 tokens: 64 are padding",)


def test_rope_scaling(meta, settings) -> None:
    """A bare number multiplies positions, as upstream's does; Meta's switch means Llama 3.1's constants."""
    directory = meta(dim=64, n_heads=4)
    plain, _ = draw(directory).build(Layout())
    stretched, _ = draw(directory, llama_config=[settings(rope_scaling=0.25)]).build(Layout())
    torch.testing.assert_close(stretched.frequencies, plain.frequencies * 0.25)
    scaled, _ = draw(directory, llama_config=[settings(use_scaled_rope=True, rope_theta=5e5)]).build(Layout())
    torch.testing.assert_close(scaled.frequencies, llama3_frequencies(16, 5e5))
    args = draw(directory, llama_config=[settings(rope_scaling={"rope_type": "linear", "factor": 4.0})]).args
    assert (args.rope_scaling.kind, args.rope_scaling.factor) == ("linear", 4.0)
    with pytest.raises(ConfigError, match=r"'rope_scaling\.kind' is 'yarn'"):
        draw(directory, llama_config=[settings(rope_scaling={"rope_type": "yarn", "factor": 4.0})])


def llama3_frequencies(width: int, theta: float) -> torch.Tensor:
    """Meta's `apply_scaling` (llama-models, model.py), with its constants."""
    scaled = []
    for i in range(0, width, 2):
        frequency = theta ** (-i / width)
        wavelength = 2 * torch.pi / frequency
        if wavelength < 8192 / 4:
            scaled.append(frequency)
        elif wavelength > 8192 / 1:
            scaled.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            scaled.append((1 - smooth) * frequency / 8 + smooth * frequency)
    return torch.tensor(scaled)


def test_more_tokens_than_rows(meta, settings) -> None:
    """Special tokens that are added make the embedding grow, which is said, as is that nothing would train its rows."""
    directory = meta(dim=64)
    blueprint = draw(directory, new_tokens=["<|one|>", "<|two|>"])
    assert (blueprint.args.vocab_size, blueprint.tokenizer.vocab_size) == (514, 514)
    grows, untrained = blueprint.notes
    assert grows.startswith("the tokenizer has 2 tokens more than the embedding's 512 rows")
    assert "vocabulary_tuning" in untrained
    learned = draw(directory, new_tokens=["<|one|>"], llama_config=[settings(vocabulary_tuning=True)])
    assert len(learned.notes) == 1


def test_another_family(tiny_base: Path) -> None:
    """The right type is told, with the method that was asked for."""
    for asked, right in (("opt_peft", "llama_peft"), ("glm", "llama")):
        with pytest.raises(ConfigError) as caught:
            draw(tiny_base, llama_type=asked)
        assert str(caught.value) == (
            f"--llama_type {asked}: the checkpoint is a llama, of the family llama; use --llama_type {right}."
        )


def test_blocks_that_are_not_there(meta) -> None:
    """Settings and files of two different models."""
    directory = meta(dim=64, n_layers=4, blocks=3)
    with pytest.raises(AccessoryError, match=f"{directory}: its settings say 4 blocks, its files hold 3"):
        draw(directory)


def test_settings_without_a_meaning_are_said(meta: Callable[..., Path]) -> None:
    """A note names the keys in a checkpoint's own file that belong to another method or to other software."""
    path = meta(dim=64, n_layers=1, n_heads=4, moe={"num_experts": 8}, quantization_args={}, lora_rank=4)
    assert draw(path, llama_type="llama").notes == (
        f"{path}: not used of its settings, as unknown here: moe, quantization_args",
    )
