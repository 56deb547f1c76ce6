"""Meta's and LLaMA2-Accessory's `.pth` files as we write them, against a cut of our own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.checkpoint.formats.torch_writing import meta_settings, write_torch_shards
from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.whole import WholeModel
from accessory.errors import CheckpointError, ParallelError
from accessory.export import open_whole
from accessory.meta import MetaModel
from accessory.model.args import ModelArgs
from accessory.tokenizer import open_tokenizer
from tests.checkpoint.conftest import cut_as_meta

TOKENS = torch.arange(40) * 7 % 500
SIZES = {"dim": 128, "n_layers": 2, "n_heads": 4, "hidden_dim": 256, "vocab_size": 512}
LINEARS = {
    "attention.wq": (128, 128), "attention.wk": (128, 128), "attention.wv": (128, 128), "attention.wo": (128, 128),
    "feed_forward.w1": (256, 128), "feed_forward.w2": (128, 256), "feed_forward.w3": (256, 128),
}  # fmt: skip
WHOLE_BIASES = ("wo.bias", "w2.bias")  # of linears that are cut along their input


def random_model(base: Path, biased: tuple[str, ...] = (), **settings: object) -> tuple[WholeModel, dict[str, Tensor]]:
    """A model of four key/value heads in Meta's rotary order, biases in the linears of `biased`; and its tensors."""
    shapes = {"tok_embeddings.weight": (512, 128), "output.weight": (512, 128), "norm.weight": (128,)}
    for i in range(2):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in LINEARS.items()}
        shapes |= {f"layers.{i}.{name}.weight": (128,) for name in ("attention_norm", "ffn_norm")}
        shapes |= {f"layers.{i}.{name}.bias": LINEARS[name][:1] for name in biased}
    if settings.get("tie_word_embeddings"):
        del shapes["output.weight"]
    generator = torch.Generator().manual_seed(0)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    args = ModelArgs(**SIZES, **settings)
    return WholeModel(args, {n: HeldTensor(t) for n, t in tensors.items()}, open_tokenizer(base)), tensors


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("flavour", ["meta", "upstream"])
def test_files_are_metas(tiny_base: Path, tmp_path: Path, flavour: str, ranks: int) -> None:
    """Names, shapes and values of each rank's file, and nothing else beside them; read back, every bit is there."""
    model, tensors = random_model(tiny_base)
    write_torch_shards(model, tmp_path / "out", torch.float32, flavour, ranks)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.pth"))
    name = "consolidated.{:02d}.pth" if flavour == "meta" else "consolidated.{:02d}-of-{:02d}.model.pth"
    assert files == [name.format(rank, ranks) for rank in range(ranks)]
    for rank, file in enumerate(files):
        state = torch.load(tmp_path / "out" / file, weights_only=True)
        if flavour == "upstream":
            assert state.keys() == {"model"}
            assert all(key.startswith("llma.") for key in state["model"])
            state = {key.removeprefix("llma."): value for key, value in state["model"].items()}
        expected = cut_as_meta(tensors, rank, ranks, 1)
        del expected["rope.freqs"]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], value) for key, value in expected.items())
    reread = open_source(tmp_path / "out").tensors
    assert reread.keys() == tensors.keys()
    assert all(torch.equal(reread[key].read(), value) for key, value in tensors.items())
    others = {path.name for path in (tmp_path / "out").iterdir()} - set(files) - {"tokenizer_config.json"}
    assert others == {"tokenizer.json"} | ({"params.json"} if flavour == "meta" else {"config.json", "meta.json"})


def test_rows_are_in_metas_order(tiny_base: Path, weights, tmp_path: Path) -> None:
    """q and k of a Hugging Face checkpoint, as its conversion script undoes them; also in the rows' biases' order."""
    model, _, _ = open_whole([tiny_base])
    write_torch_shards(model, tmp_path / "out", torch.float32, "meta", 2)
    reread = open_source(tmp_path / "out").tensors
    assert all(torch.equal(reread[name].read(), weight) for name, weight in weights.items())
    found = MetaModel.from_pretrained(tmp_path / "out", dtype="fp32").logits(TOKENS, (40,))
    expected = MetaModel.from_pretrained(tiny_base, dtype="fp32").logits(TOKENS, (40,))
    assert (found - expected).abs().max() < 2e-5


def test_dtype(tiny_base: Path, tmp_path: Path) -> None:
    """What was fp32 is rounded once."""
    model, tensors = random_model(tiny_base)
    write_torch_shards(model, tmp_path / "out", torch.bfloat16, "meta", 1)
    state = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    assert all(torch.equal(state[name], tensor.to(torch.bfloat16)) for name, tensor in tensors.items())


def test_tied_head_is_written(tiny_base: Path, tmp_path: Path) -> None:
    """Meta's settings cannot say that it is the embedding; each is cut its own way."""
    model, tensors = random_model(tiny_base, tie_word_embeddings=True)
    write_torch_shards(model, tmp_path / "out", torch.float32, "meta", 2)
    for rank in range(2):
        state = torch.load(tmp_path / "out" / f"consolidated.{rank:02d}.pth", weights_only=True)
        embedding = tensors["tok_embeddings.weight"]
        assert torch.equal(state["output.weight"], embedding.chunk(2, 0)[rank])
        assert torch.equal(state["tok_embeddings.weight"], embedding.chunk(2, 1)[rank])
    assert torch.equal(open_source(tmp_path / "out").tensors["output.weight"].read(), embedding)


def test_biases_of_upstream(tiny_base: Path, tmp_path: Path) -> None:
    """It has one in every linear: those that the model lacks are zeros. A bias is cut with its rows."""
    biased = ("attention.wq", "attention.wk", "attention.wv")
    model, tensors = random_model(tiny_base, biased, qkv_bias=True)
    write_torch_shards(model, tmp_path / "out", torch.float32, "upstream", 2)
    states = [torch.load(path, weights_only=True)["model"] for path in sorted((tmp_path / "out").glob("*.pth"))]
    for module, shape in LINEARS.items():
        key = f"layers.1.{module}.bias"
        expected = tensors.get(key, torch.zeros(shape[0]))
        for rank, state in enumerate(states):
            wanted = expected if key.endswith(WHOLE_BIASES) else expected.chunk(2)[rank]
            assert torch.equal(state[f"llma.{key}"], wanted), key
    assert json.loads((tmp_path / "out" / "meta.json").read_text()) == {"llama_type": "llama_peft"}
    MetaModel.from_pretrained(tmp_path / "out")


def test_biases_without_a_place(tiny_base: Path, tmp_path: Path) -> None:
    """Meta's files have none."""
    model, _ = random_model(tiny_base, ("attention.wo",), out_bias=True)
    with pytest.raises(CheckpointError, match=r"of meta cannot .* out_bias True.* biases of wo: .*--drop_biases"):
        write_torch_shards(model, tmp_path / "out", torch.float32, "meta", 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dim", [64, 128, 320, 2048, 3200, 4096, 5120])
def test_width_survives_metas_rounding(dim: int) -> None:
    """Of any size: the multiplier is rounded down by its reader, and up to a multiple."""
    for width in (*range(50, 400), 5632, 8640, 11008, 11009, 13824, 14336, 28672):
        params = meta_settings(ModelArgs(dim=dim, n_heads=4, hidden_dim=width, vocab_size=8), "meta")
        metas = int(params["ffn_dim_multiplier"] * int(2 * 4 * dim / 3))  # llama/model.py, FeedForward
        metas = params["multiple_of"] * ((metas + params["multiple_of"] - 1) // params["multiple_of"])
        assert metas == width == ModelArgs(**params).hidden_dim


LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("scaling", "written"),
    [
        (None, {}),
        ({"kind": "linear", "factor": 4.0}, {"rope_scaling": 0.25}),
        (LLAMA3, {"use_scaled_rope": True}),
    ],
)
def test_rope_scaling(scaling: dict | None, written: dict) -> None:
    """In upstream's words, and in Meta's."""
    params = meta_settings(ModelArgs(**SIZES, rope_scaling=scaling), "upstream")
    assert {key: params[key] for key in ("rope_scaling", "use_scaled_rope") if key in params} == written
    assert ModelArgs(**params).rope_scaling == ModelArgs(**SIZES, rope_scaling=scaling).rope_scaling


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"head_dim": 64}, "head_dim 64"),
        ({"gated": False, "activation": "gelu", "norm": "layer"}, "gated False, activation 'gelu', norm 'layer'"),
        ({"position": "alibi"}, "position 'alibi'"),
        ({"sliding_window": 64}, "sliding_window 64"),
        ({"rotary_dim": 16}, "rotary_dim 16"),
        ({"qk_norm": True}, "qk_norm True"),
        ({"rope_scaling": LLAMA3 | {"factor": 32.0}}, "rope_scaling RopeScaling"),
        ({"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, "rope_scaling RopeScaling"),
    ],
)
def test_other_blocks_are_refused(tiny_base: Path, tmp_path: Path, settings: dict, named: str) -> None:
    """By the settings that make them others."""
    model, _ = random_model(tiny_base)
    model = WholeModel(ModelArgs(**SIZES, **settings), {}, model.tokenizer)
    for flavour in ("meta", "upstream"):
        with pytest.raises(CheckpointError, match=rf"A params.json of {flavour} cannot express this model's {named}"):
            write_torch_shards(model, tmp_path / "out", torch.float32, flavour, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(3, "3 does not divide this model's 4 attention heads.*sizes that do: 1, 2, 4"), (8, "8 does not divide")],
)
def test_number_of_shards(tiny_base: Path, tmp_path: Path, ranks: int, message: str) -> None:
    """One that does not divide the model is refused before anything is written."""
    model, _ = random_model(tiny_base)
    with pytest.raises(ParallelError, match=message):
        write_torch_shards(model, tmp_path / "out", torch.float32, "meta", ranks)
    assert not list(tmp_path.iterdir())


def test_vocabulary_that_cannot_be_cut(tiny_base: Path, tmp_path: Path) -> None:
    """Meta's files have no padding."""
    model, _ = random_model(tiny_base)
    odd = WholeModel(model.args.model_copy(update={"vocab_size": 513}), model.tensors, model.tokenizer)
    with pytest.raises(ParallelError, match="2 shards do not divide 513 tokens and width 128"):
        write_torch_shards(odd, tmp_path / "out", torch.float32, "meta", 2)
