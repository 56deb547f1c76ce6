"""Hugging Face directories as we write them: what transformers reads of them, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, normalizers

from accessory.checkpoint import save
from accessory.checkpoint.formats.hugging_face_writing import write_hugging_face
from accessory.checkpoint.formats.own import write_own
from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from accessory.export import open_whole
from accessory.tokenizer.pre_tokenization import PRE_TOKENIZATIONS
from tests.conftest import copy_tokenizer, small_sentencepiece
from tests.model.families.matrix import CASES, SIZES, known

FAMILIES = ("llama3", "smollm", "qwen2", "baichuan_7b", "internlm2", "opt", "bloom", "neox", "glm", "chatglm")


def written(base: Path, target: Path, **options: str) -> Path:
    """`base` in fp32."""
    write_hugging_face(open_whole([base])[0], target, torch.float32, **options)
    return target


def config_of(path: Path) -> dict:
    """Its config.json."""
    return json.loads((path / "config.json").read_text())


@pytest.fixture(scope="module")
def base_of(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a case of the families -> its checkpoint, with a tokenizer."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            CASES[name].write(made[name])
            copy_tokenizer(tiny_base, made[name])
            if name == "qwen2":  # transformers 5 cuts text as Qwen does, whatever the tokenizer.json of a qwen2 says
                pipeline = Tokenizer.from_file(str(tiny_base / "tokenizer.json"))
                pipeline.normalizer, pipeline.pre_tokenizer = (
                    normalizers.NFC(),
                    PRE_TOKENIZATIONS["qwen2"].pre_tokenizer(),
                )
                pipeline.save(str(made[name] / "tokenizer.json"))
        return made[name]

    return make


@pytest.fixture(scope="module")
def neox(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-NeoX with the tiny model's tokenizer."""
    directory = tmp_path_factory.mktemp("neox")
    known("gpt_neox", **SIZES | {"vocab_size": 512, "intermediate_size": 256})(directory)
    copy_tokenizer(tiny_base, directory)
    return directory


def test_there_and_back(tiny_base: Path, tmp_path: Path) -> None:
    """Names and bits of transformers' own file; its settings, and the tokens that end an answer."""
    target = written(tiny_base, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (tiny_base, target))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    config = transformers.AutoConfig.from_pretrained(target)
    original = transformers.AutoConfig.from_pretrained(tiny_base)
    ours, theirs = config.to_dict(), original.to_dict()
    differing = {key for key in theirs if ours.get(key) != theirs[key]}
    assert differing <= {"dtype", "_name_or_path", "pad_token_id", "torch_dtype"}
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 1)
    assert config.dtype == torch.float32 and config.architectures == ["LlamaForCausalLM"]
    text = "What is Accessory?"
    tokens = [transformers.AutoTokenizer.from_pretrained(path)(text).input_ids for path in (tiny_base, target)]
    assert [0, *tokens[0]] == tokens[1]  # beside a tokenizer.json, transformers 5 ignores the base's add_bos_token


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_written_as_it_was(base_of, tmp_path: Path, strings: list[str], name: str) -> None:
    """Bit for bit, under the names of the checkpoint that was read, whatever is fused in it; settings, tokens too."""
    base = base_of(name)
    model, _, _ = open_whole([base])
    write_hugging_face(model, tmp_path / "out", torch.float32)
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    before = {key: tensor for key, tensor in before.items() if not key.endswith("inv_freq")}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert config_of(tmp_path / "out")["model_type"] == CASES[name].model_type
    assert open_source(tmp_path / "out").settings == open_source(base).settings
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", split_special_tokens=True)
    ids = [[0, *ids] for ids in model.tokenizer.encode_batch(strings)]
    assert [theirs(text).input_ids for text in strings] == ids


def test_a_base_that_holds_only_a_sentencepiece_model(tiny_base: Path, tmp_path: Path, strings: list[str]) -> None:
    """transformers reads what the library itself reads, and the model goes along."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer*")))
    (base / "tokenizer.model").write_bytes(small_sentencepiece())
    target = written(base, tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(target, split_special_tokens=True)
    library = SentencePieceProcessor(model_proto=small_sentencepiece())
    assert [theirs(text).input_ids for text in strings] == [[1, *ids] for ids in library.encode(strings)]
    assert (target / "tokenizer.model").read_bytes() == small_sentencepiece()


def test_tied_head_is_left_out(tiny_base: Path, tmp_path: Path) -> None:
    """As transformers itself does."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "tied"))
    stored = load_file(base / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(config_of(base) | {"tie_word_embeddings": True}))
    target = written(base, tmp_path / "out")
    assert "lm_head.weight" not in load_file(target / "model.safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, stored["model.embed_tokens.weight"])


def test_several_ends_of_an_answer(tiny_base: Path, tmp_path: Path) -> None:
    """All are told to transformers, the one that ends a document first; no BOS is null."""
    model, _, _ = open_whole([tiny_base])
    model.tokenizer.stop_ids = frozenset({5, 1, 9})
    model.tokenizer.bos_id = None
    write_hugging_face(model, tmp_path / "out", torch.float32)
    config = config_of(tmp_path / "out")
    assert config["eos_token_id"][0] == 1 and sorted(config["eos_token_id"]) == [1, 5, 9]
    assert config["bos_token_id"] is None and config["pad_token_id"] == 1


def test_shards(neox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named and indexed as transformers does; a tensor above the limit has a file of its own."""
    monkeypatch.setattr(save, "SHARD_BYTES", 150_000)
    target = written(neox, tmp_path / "out")
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 4 and not (target / "model.safetensors").exists()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found = {name: load_file(target / name) for name in files}
    assert index["weight_map"] == {key: name for name, tensors in found.items() for key in tensors}
    for tensors in found.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 150_000
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (neox, target)
    ]
    assert all(torch.equal(models[1][key], value) for key, value in models[0].items())


def test_shards_of_packed_weights(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix and its statistics may lie in different files."""
    whole = written(tiny_base, tmp_path / "whole", quant_type="nf4")
    monkeypatch.setattr(save, "SHARD_BYTES", 100_000)
    cut = written(tiny_base, tmp_path / "cut", quant_type="nf4")
    assert len(list(cut.glob("*.safetensors"))) > 3
    first, second = (open_source(path).tensors for path in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(second[name].read(), tensor.read()) for name, tensor in first.items())


def test_packed_rows_stay_where_they_are(tiny_base: Path, weights, write_torch, neox: Path, tmp_path: Path) -> None:
    """Packed in Meta's rotary order, or apart from what they are fused with, they are refused, and the way is named."""
    metas = write_torch(tmp_path / "meta", weights)
    for base, name in ((metas, "self_attn.q_proj"), (neox, "attention.query_key_value")):
        packed = tmp_path / f"packed {name}"
        write_own(open_whole([base])[0], packed, torch.float32, "nf4")
        with pytest.raises(CheckpointError, match=rf"{name}.weight.* cannot be laid out anew.*quantize.py .*--to hf"):
            written(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fused_matrices_are_packed_whole(neox: Path, tmp_path: Path) -> None:
    """As bitsandbytes packs them when transformers loads the model."""
    target = written(neox, tmp_path / "out", quant_type="nf4_single")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        neox, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
    )
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = load_file(target / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    for i in range(2):
        for module in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
            for part in ("", ".absmax", ".quant_map"):
                key = f"gpt_neox.layers.{i}.{module}.weight{part}"
                assert torch.equal(ours[key], expected[key]), key


def test_what_it_cannot_say_is_named(tiny_base: Path, tmp_path: Path) -> None:
    """A setting of ours that a llama's config.json has no word for."""
    model, _, _ = open_whole([tiny_base])
    args = model.args.model_copy(update={"sliding_window": 7})
    with pytest.raises(CheckpointError, match=r"A llama config.json cannot express this model's sliding_window 7"):
        write_hugging_face(replace(model, args=args), tmp_path / "out", torch.float32)
    assert not list(tmp_path.iterdir())
