"""GGUF written for every model type that has it; checked by transformers, llama.cpp and the gguf package."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from accessory.checkpoint.formats.gguf_file import open_gguf_file
from accessory.checkpoint.formats.gguf_writing import write_gguf
from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.load import targets
from accessory.checkpoint.naming import in_rotary_layout
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.checkpoint.whole import WholeModel
from accessory.errors import CheckpointError, TokenizerError
from accessory.model.args import ModelArgs, RopeScaling
from accessory.model.decoder import Decoder
from accessory.model.families import ARCHITECTURES
from accessory.tokenizer import Tokenizer, open_tokenizer
from tests.checkpoint.formats.gguf_models import (
    LAYER_NORMS,
    LLAMA_3,
    MODELS,
    SMALL,
    VOCABULARY,
    as_source,
    logits,
    token_ids,
    write_raw,
)

READ_BY_TRANSFORMERS = ("llama", "llama tied, wide heads", "mistral", "qwen2", "qwen3", "bloom")


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    """Of as many tokens as the models have rows."""
    return open_tokenizer(tiny_base)


@pytest.fixture(scope="module")
def make(tokenizer: Tokenizer) -> Callable[..., WholeModel]:
    """Settings that differ from `SMALL` -> a model of random weights that F16 holds exactly."""

    def build(**changes: Any) -> WholeModel:
        args = ModelArgs(**{**SMALL, **changes})
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for target in targets(Decoder(args, dtype=torch.float32)):
            noise = torch.randn(target.local_shape, generator=generator)
            is_scale = noise.dim() == 1 and not target.name.endswith("bias")
            tensors[target.name] = HeldTensor((noise * 0.15 + is_scale).half().float())
        return WholeModel(args, tensors, tokenizer)

    return build


@pytest.mark.parametrize("name", MODELS)
def test_every_model_type_comes_back(tmp_path: Path, make, name: str) -> None:
    """Settings, every weight bit by bit, and the logits."""
    model = make(**MODELS[name])
    write_gguf(model, tmp_path / "new" / "model.gguf", "f16")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.gguf"]
    source = open_source(tmp_path / "new" / "model.gguf")
    args = model_args_of(source)
    wording = {"architecture", "rotary_layout"}
    assert args.model_dump(exclude=wording) == model.args.model_dump(exclude=wording)
    assert args.rotary_layout == ARCHITECTURES[model.args.architecture].gguf.rotary_layout
    assert source.llama_type == ARCHITECTURES[model.args.architecture].family
    back = in_rotary_layout(source.tensors, args, args.rotary_layout, model.args.rotary_layout)
    assert back.keys() == model.tensors.keys()
    for key, tensor in model.tensors.items():
        assert torch.equal(back[key].read().float(), tensor.read()), key
    torch.testing.assert_close(logits(args, source), logits(model.args, as_source(model)), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(tmp_path: Path, make, name: str) -> None:
    """Its own reader undoes the order of q and k by its own rules."""
    model = make(**MODELS[name])
    write_gguf(model, tmp_path / "model.gguf", "f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(token_ids()[None]).logits[0]
    torch.testing.assert_close(logits(model.args, as_source(model)), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_model(llama_cpp, tmp_path: Path, make, name: str) -> None:
    """It loads every file type of every model type, and gives the next token the probabilities it has here."""
    model, ids = make(**MODELS[name]), token_ids()
    for file_type, most in (("f32", 3e-4), ("f16", 1e-3), ("bf16", 2e-3), ("q8_0", 1e-2)):
        path = tmp_path / f"{file_type}.gguf"
        write_gguf(model, path, file_type)
        source = open_gguf_file(path)
        expected = logits(model_args_of(source), source)[-1].softmax(-1)
        found = torch.tensor(llama_cpp.ask(path, prompts=[ids])["answers"][0]["probabilities"])
        torch.testing.assert_close(found, expected, atol=most, rtol=0)


def test_names_are_those_of_the_gguf_package(tmp_path: Path, make) -> None:
    """Each tensor that is written is one that llama.cpp has for the architecture."""
    for name, changes in MODELS.items():
        path = tmp_path / f"{name}.gguf"
        write_gguf(make(**changes), path, "q8_0")
        reader = gguf.GGUFReader(path)
        label = reader.fields["general.architecture"].contents()
        known = next(arch for arch, its in gguf.MODEL_ARCH_NAMES.items() if its == label)
        layers = range(changes.get("n_layers", 2))
        templates = [gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[known]]
        modules = {template.format(bid=i) for template in templates for i in layers}
        found = {tensor.name.rpartition(".")[0] for tensor in reader.tensors}
        assert found <= modules, name


@pytest.mark.parametrize("layers, head_dim, theta", [(1, 64, 500000.0), (1, 128, 500000.0), (1, 16, 10000.0)])
@pytest.mark.parametrize("factor", [8.0, 16.0, 32.0])
def test_llama_3_factors(tmp_path: Path, make, layers: int, head_dim: int, theta: float, factor: float) -> None:
    """They are those that llama.cpp's converter works out, wavelength by wavelength, and are known again."""
    scaling = RopeScaling(kind="llama3", factor=factor)
    model = make(n_layers=layers, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    write_gguf(model, tmp_path / "model.gguf", "f16")
    expected = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        smooth = (8192 / wavelength - 1) / (4 - 1)
        middle = 1 / ((1 - smooth) / factor + smooth)
        expected.append(1.0 if wavelength < 8192 / 4 else factor if wavelength > 8192 else middle)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}["rope_freqs.weight"]
    np.testing.assert_allclose(stored.data, expected, rtol=1e-4)
    assert model_args_of(open_gguf_file(tmp_path / "model.gguf")).rope_scaling == scaling
    if head_dim == 16:
        path = write_raw(tmp_path / "theirs.gguf", tensors={"rope_freqs.weight": np.float32(expected)})
        assert model_args_of(open_gguf_file(path)).rope_scaling == scaling


def test_types_of_what_is_written(tmp_path: Path, make) -> None:
    """Q8_0 holds what the package's own quantization gives; vectors stay F32, and rows that do not divide F16."""
    model = make(hidden_dim=80)
    for file_type, kind in (("q8_0", Kind.Q8_0), ("bf16", Kind.BF16), ("f32", Kind.F32)):
        write_gguf(model, tmp_path / f"{file_type}.gguf", file_type)
        tensors = open_gguf_file(tmp_path / f"{file_type}.gguf").tensors
        assert tensors["layers.0.attention_norm.weight"].dtype == "F32"
        for name in ("tok_embeddings.weight", "layers.1.attention.wv.weight", "output.weight"):
            plain = model.tensors[name].read().numpy()
            expected = gguf.dequantize(gguf.quantize(plain, kind), kind)
            assert tensors[name].dtype == kind.name
            assert np.array_equal(tensors[name].read().float().numpy(), expected)
        narrow = tensors["layers.0.feed_forward.w2.weight"]
        assert narrow.shape == (64, 80)
        assert narrow.dtype == ("F16" if kind == Kind.Q8_0 else kind.name)


def test_the_package_reads_metadata_and_tokenizer(tmp_path: Path, make, tokenizer: Tokenizer) -> None:
    """What llama.cpp asks for, under its names, and a vocabulary that encodes the same."""
    write_gguf(make(rope_theta=1e6), tmp_path / "tiny.gguf", "q8_0")
    fields = {key: f.contents() for key, f in gguf.GGUFReader(tmp_path / "tiny.gguf").fields.items()}
    expected = {
        "general.architecture": "llama", "general.name": "tiny", "general.file_type": 7,
        "general.quantization_version": 2, "llama.context_length": 64, "llama.embedding_length": 64,
        "llama.block_count": 2, "llama.feed_forward_length": 160, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.attention.key_length": 16, "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16, "llama.rope.freq_base": 1e6, "llama.vocab_size": VOCABULARY,
    }  # fmt: skip
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert len(fields["tokenizer.ggml.tokens"]) == VOCABULARY
    text = "Why does a ship of steel float?"
    again = open_tokenizer(tmp_path / "tiny.gguf")
    assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "opt", "position": "learned"}, r"llama.cpp has no opt. None of .*; write it --to hf"),
        ({"architecture": "qwen2", "head_dim": 32}, "qwen2 cannot express .*head_dim 32.*give --architecture llama"),
        ({"rotary_dim": 8}, "llama cannot express .*rotary_dim 8.*give --architecture glm"),
        ({"architecture": "baichuan", "n_kv_heads": 4}, r"2 blocks; expected 32 \(rotary\).*give --architecture llama"),
        ({"architecture": "qwen2", "qkv_bias": True, "mlp_bias": True}, "qwen2 cannot express .*mlp_bias True"),
        ({"architecture": "gpt_neox", **LAYER_NORMS, "activation": "gelu_tanh"}, "activation 'gelu_tanh'"),
        ({"architecture": "baichuan", "n_layers": 32, "position": "alibi"}, "position 'alibi'"),
        ({"architecture": "baichuan", "n_layers": 40}, "position 'rotary'"),
        ({"architecture": "qwen2", "qkv_bias": True, "head_dim": 64, "rope_scaling": LLAMA_3}, "rope_scaling "),
    ],
)
def test_settings_without_a_word_in_gguf(tmp_path: Path, make, changes: dict, said: str) -> None:
    """They are named, and nothing is left behind."""
    with pytest.raises(CheckpointError, match=said):
        write_gguf(make(**changes), tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_what_changes_nothing_within_the_context_is_left_out(tmp_path: Path, make, capsys) -> None:
    """Dynamic scaling, and a window as wide as the longest document; a narrower one is the context, and said."""
    scaling = RopeScaling(kind="dynamic", factor=2.0)
    write_gguf(make(architecture="internlm2", rope_scaling=scaling), tmp_path / "a.gguf", "f16")
    write_gguf(make(architecture="mistral", sliding_window=64), tmp_path / "b.gguf", "f16")
    assert model_args_of(open_gguf_file(tmp_path / "a.gguf")).rope_scaling is None
    assert model_args_of(open_gguf_file(tmp_path / "b.gguf")).sliding_window is None
    assert capsys.readouterr().out == ""
    write_gguf(make(architecture="mistral", sliding_window=40), tmp_path / "c.gguf", "f16")
    assert "c.gguf: states a context of 40 tokens, the model's sliding window" in capsys.readouterr().out
    assert model_args_of(open_gguf_file(tmp_path / "c.gguf")).max_seq_len == 40


@pytest.mark.parametrize("name", ["baichuan 7B", "internlm2", "gpt_neox"])
def test_a_head_that_llama_cpp_must_have_is_written(tmp_path: Path, make, llama_cpp, name: str) -> None:
    """Where it takes no embedding for the head, the embedding stands there twice."""
    model = make(**MODELS[name], tie_word_embeddings=True)
    write_gguf(model, tmp_path / "model.gguf", "f32")
    tensors = open_gguf_file(tmp_path / "model.gguf").tensors
    assert torch.equal(tensors["output.weight"].read(), model.tensors["tok_embeddings.weight"].read())
    assert llama_cpp.ask(tmp_path / "model.gguf", prompts=[[1, 2]])["answers"]


def test_writing_that_fails_leaves_nothing(tmp_path: Path, make, tokenizer: Tokenizer) -> None:
    """A type that is not known, a file in the way, a value too large for F16, a tokenizer larger than the model."""
    model, path = make(), tmp_path / "model.gguf"
    with pytest.raises(CheckpointError, match=r"'q8' cannot be written. Did you mean 'q8_0'"):
        write_gguf(model, path, "q8")
    model.tensors["output.weight"] = HeldTensor(torch.full((VOCABULARY, 64), 1e5))
    with pytest.raises(CheckpointError, match=r"output.weight has values that do not fit into F16; write f32 or bf16"):
        write_gguf(model, path, "f16")
    with pytest.raises(TokenizerError):
        write_gguf(make(vocab_size=VOCABULARY - 1), path, "f16")
    assert not list(tmp_path.iterdir())
    path.write_text("mine")
    with pytest.raises(CheckpointError, match=r"found a text file of 4 bytes there; expected a new file"):
        write_gguf(model, path, "f16")
    assert path.read_text() == "mine"
    with pytest.raises(CheckpointError, match=r"cannot be written .*bytes are free"):
        write_gguf(make(), path / "below" / "model.gguf", "f16")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file would look like a whole one."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", fail)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_gguf(make(), tmp_path / "model.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_tensors_are_read_one_at_a_time(tmp_path: Path, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading one and the next, the first has been written."""
    order: list[str] = []
    read, write = HeldTensor.read, gguf.GGUFWriter.write_tensor_data

    def noted(kind: str, act: Callable) -> Callable:
        return lambda *given, **named: (order.append(kind), act(*given, **named))[1]

    model = make(architecture="internlm3")
    model = replace(model, args=model.args.model_copy(update={"rotary_layout": "pairs"}))
    monkeypatch.setattr(HeldTensor, "read", noted("read", read))
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", noted("write", write))
    write_gguf(model, tmp_path / "model.gguf", "q8_0")
    assert order == ["read", "write"] * len(model.tensors)


def test_a_model_without_embedding_is_refused(tmp_path: Path, make) -> None:
    """In either direction."""
    with pytest.raises(CheckpointError, match=r"token_embd.weight is missing"):
        open_gguf_file(write_raw(tmp_path / "a.gguf", tensors={"token_embd.weight": None}))
    model = make()
    del model.tensors["tok_embeddings.weight"]
    with pytest.raises(CheckpointError, match="has no embedding"):
        write_gguf(model, tmp_path / "b.gguf", "f16")
