"""One tiny model written in every format that can be read, by the libraries and rules that define each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.parallel import groups
from accessory.parallel.groups import Layout
from tests.conftest import copy_tokenizer

HEADS, KV_HEADS = 4, 2
META_SETTINGS = {
    "dim": 128, "n_layers": 2, "n_heads": HEADS, "n_kv_heads": KV_HEADS, "vocab_size": -1, "norm_eps": 1e-5,
    "multiple_of": 256, "ffn_dim_multiplier": 0.75,
}  # fmt: skip
"""Meta's params.json of the tiny model; its MLP width, 256, has to be worked out as Meta does."""

META_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
}  # fmt: skip
META_CUTS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
FORMATS = ("hf", "hf_sharded", "meta1", "meta2", "llama3_2", "upstream1", "upstream2", "gguf", "ours", "ours_sharded")


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture(scope="session")
def weights(tiny_base: Path) -> dict[str, Tensor]:
    """The tiny model under Meta's names, wq and wk in Meta's row order (transformers' conversion, backwards)."""

    def rows(weight: Tensor, heads: int) -> Tensor:
        width = weight.shape[0] // heads
        return torch.cat([
            torch.stack([head[: width // 2], head[width // 2 :]], dim=1).flatten(0, 1) for head in weight.split(width)
        ])  # fmt: skip

    named = {}
    for name, weight in load_file(tiny_base / "model.safetensors").items():
        for theirs, metas in META_NAMES.items():
            name = name.replace(theirs, metas)
        heads = {"wq": HEADS, "wk": KV_HEADS}.get(name.split(".")[-2])
        named[name] = rows(weight, heads) if heads else weight
    return named


def cut_as_meta(weights: dict[str, Tensor], rank: int, ranks: int, embedding_dim: int) -> dict[str, Tensor]:
    """What Meta puts into the file of one rank: slices of the matrices, norms whole, and a table nobody needs."""
    cuts = {**META_CUTS, "tok_embeddings": embedding_dim}
    state = {"rope.freqs": torch.ones(16)}
    for name, weight in weights.items():
        dim = cuts.get(name.split(".")[-2])
        state[name] = weight if dim is None else weight.chunk(ranks, dim)[rank].clone()
    return state


@pytest.fixture(scope="session")
def write_torch(tiny_base: Path) -> Callable[..., Path]:
    """(directory, weights, ranks, embedding_dim, upstream) -> the directory, with shards, params.json, tokenizer."""

    def write(
        directory: Path, weights: dict[str, Tensor], *, ranks: int = 1, embedding_dim: int = 1, upstream: bool = False
    ) -> Path:
        directory.mkdir()
        for rank in range(ranks):
            state = cut_as_meta(weights, rank, ranks, embedding_dim)
            name = f"consolidated.{rank:02d}.pth"
            if upstream:
                state = {"model": {f"llma.{key}": value for key, value in state.items()}}
                name = f"consolidated.{rank:02d}-of-{ranks:02d}.model.pth"
            torch.save(state, directory / name)
        (directory / "params.json").write_text(json.dumps(META_SETTINGS))
        copy_tokenizer(tiny_base, directory)
        return directory

    return write


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """(path, weights, kind) -> the file; matrices are stored as `kind`, vectors as F32, as llama.cpp's tools do."""

    def write(path: Path, weights: dict[str, Tensor], kind: str = "F32", drop: str = "") -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(512)
        if drop != "embedding_length":
            writer.add_embedding_length(128)
        writer.add_block_count(2)
        writer.add_feed_forward_length(256)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        for name, weight in weights.items():
            stored = gguf.GGMLQuantizationType[kind if weight.dim() == 2 else "F32"]
            data = gguf.quants.quantize(weight.numpy(), stored)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def hf_sharded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hugging Face directory in three files and an index."""
    directory = tmp_path_factory.mktemp("sharded")
    shutil.copy(tiny_base / "config.json", directory)
    copy_tokenizer(tiny_base, directory)
    state = load_file(tiny_base / "model.safetensors")
    where = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(where.values()):
        save_file({name: state[name] for name, its in where.items() if its == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


@pytest.fixture(scope="session")
def formats(
    tiny_base: Path, hf_sharded: Path, weights, write_torch, write_gguf, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Name of a format -> the same fp32 weights in it."""
    root = tmp_path_factory.mktemp("formats")
    for name, names in (("ours", ["model"]), ("ours_sharded", ["model-00000", "model-00001", "model"])):
        (root / name).mkdir()
        for i, stem in enumerate(names):
            part = dict(sorted(weights.items())[i :: len(names)])
            save_file(part, root / name / f"{stem}.safetensors")
        (root / name / "config.json").write_text(json.dumps(META_SETTINGS))
        (root / name / "meta.json").write_text('{"llama_type": "llama"}')
        copy_tokenizer(tiny_base, root / name)
    return {
        "hf": tiny_base,
        "hf_sharded": hf_sharded,
        "meta1": write_torch(root / "meta1", weights),
        "meta2": write_torch(root / "meta2", weights, ranks=2),
        "llama3_2": write_torch(root / "llama3_2", weights, ranks=2, embedding_dim=0),
        "upstream1": write_torch(root / "upstream1", weights, upstream=True),
        "upstream2": write_torch(root / "upstream2", weights, ranks=2, upstream=True),
        "gguf": write_gguf(root / "tiny.gguf", weights),
        "ours": root / "ours",
        "ours_sharded": root / "ours_sharded",
    }


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that take `format_name` run once for each format."""
    if "format_name" in metafunc.fixturenames:
        metafunc.parametrize("format_name", FORMATS)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """A directory -> a copy of it that a test may damage."""

    def make(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / "copy"))

    return make


FAKES = {
    "Git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 13476838\n",
    "HTML page": b"<!DOCTYPE html><html><body>401 Client Error</body></html>",
    "text file": b"this is no checkpoint\n",
    "empty file": b"",
}


@pytest.fixture(params=FAKES)
def fake(request: pytest.FixtureRequest) -> tuple[str, bytes]:
    """(what an error message should call it, bytes) of what failed downloads leave behind."""
    return request.param, FAKES[request.param]
