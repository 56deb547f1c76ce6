"""llama2.c's files, made here by the rules of its export.py, and a published one beside its Hugging Face form."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from accessory.checkpoint.formats.llama2c import is_llama2c, open_llama2c
from accessory.checkpoint.load import fill, resolve
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import Source, model_args_of
from accessory.errors import CheckpointError
from accessory.generate import next_token_logits
from accessory.method import Attachment
from accessory.model.decoder import Decoder
from accessory.parallel.data import DataParallel

DIM, HIDDEN, BLOCKS, HEADS, KV_HEADS, ROWS, LONGEST = 32, 48, 3, 4, 2, 40, 16


def arrays() -> dict[str, np.ndarray]:
    """Random weights by llama2.c's names; those of the blocks as [block, ...]."""
    random, kv = np.random.default_rng(0), DIM // HEADS * KV_HEADS
    shapes = {
        "tok_embeddings": (ROWS, DIM), "attention_norm": (BLOCKS, DIM), "ffn_norm": (BLOCKS, DIM), "norm": (DIM,),
        "wq": (BLOCKS, DIM, DIM), "wk": (BLOCKS, kv, DIM), "wv": (BLOCKS, kv, DIM), "wo": (BLOCKS, DIM, DIM),
        "w1": (BLOCKS, HIDDEN, DIM), "w2": (BLOCKS, DIM, HIDDEN), "w3": (BLOCKS, HIDDEN, DIM), "output": (ROWS, DIM),
    }  # fmt: skip
    return {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def written(weights: dict[str, np.ndarray], names: str, tables: int = 0) -> bytes:
    """The arrays called `names` one behind the other; a "-" stands for the tables of cosines and sines."""
    table = np.full(tables, 7.0, np.float32)
    return b"".join((table if name == "-" else weights[name]).tobytes() for name in names.split())


def legacy(tied: bool) -> bytes:
    """export.py, legacy_export."""
    names = "tok_embeddings attention_norm wq wk wv wo ffn_norm w1 w2 w3 norm - -" + ("" if tied else " output")
    head = struct.pack("7i", DIM, HIDDEN, BLOCKS, HEADS, KV_HEADS, ROWS if tied else -ROWS, LONGEST)
    return head + written(arrays(), names, LONGEST * DIM // HEADS // 2)


def version_1(tied: bool, version: int = 1) -> bytes:
    """export.py, version1_export."""
    head = struct.pack("Ii", 0x616B3432, version)
    head += struct.pack("7i", DIM, HIDDEN, BLOCKS, HEADS, KV_HEADS, ROWS, LONGEST) + struct.pack("B", tied)
    names = "attention_norm ffn_norm norm tok_embeddings wq wk wv wo w1 w2 w3" + ("" if tied else " output")
    return head.ljust(256, b"\0") + written(arrays(), names)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("make", [legacy, version_1])
def test_every_array_in_its_place(tmp_path: Path, make: Callable[..., bytes], tied: bool) -> None:
    """Settings and all tensors, in both formats, with and without a head of its own."""
    path = tmp_path / "model.bin"
    path.write_bytes(make(tied))
    source = open_source(path)
    args = model_args_of(source)
    assert (args.dim, args.hidden_dim, args.n_layers, args.n_heads, args.n_kv_heads) == (32, 48, 3, 4, 2)
    assert (args.vocab_size, args.max_seq_len, args.tie_word_embeddings) == (ROWS, LONGEST, tied)
    assert (args.norm_eps, args.rope_theta, args.rotary_layout, args.architecture) == (1e-5, 1e4, "pairs", "llama")
    assert (source.format, source.llama_type, source.files) == ("llama2.c", "llama", [path])
    weights = arrays()
    expected = {f"{name}.weight": weights[name] for name in ("tok_embeddings", "norm")}
    expected |= {} if tied else {"output.weight": weights["output"]}
    for i in range(BLOCKS):
        expected |= {f"layers.{i}.{name}.weight": weights[name][i] for name in ("attention_norm", "ffn_norm")}
        expected |= {f"layers.{i}.attention.{name}.weight": weights[name][i] for name in ("wq", "wk", "wv", "wo")}
        expected |= {f"layers.{i}.feed_forward.{name}.weight": weights[name][i] for name in ("w1", "w2", "w3")}
    assert source.tensors.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(source.tensors[name].read(), torch.from_numpy(weight)), name
    assert torch.equal(
        source.tensors["layers.1.feed_forward.w2.weight"].read(1, 3, 9), torch.tensor(weights["w2"][1, :, 3:9])
    )
    resolve(Decoder(args, dtype=torch.float32), [source], Attachment(), initialize=False)


def test_what_is_read_never_reaches_the_file(tmp_path: Path) -> None:
    """The mapping is private."""
    path = tmp_path / "model.bin"
    path.write_bytes(legacy(True))
    open_llama2c(path).tensors["norm.weight"].read().zero_()
    assert path.read_bytes() == legacy(True)


@pytest.mark.parametrize("make", [legacy, version_1])
@pytest.mark.parametrize("change", [-1, -4, 1, 4096])
def test_a_file_of_another_size_is_refused(tmp_path: Path, make: Callable[..., bytes], change: int) -> None:
    """Cut short by a byte or a number, or with something behind it."""
    whole = make(False)
    path = tmp_path / "model.bin"
    path.write_bytes(whole[:change] if change < 0 else whole + bytes(change))
    with pytest.raises(
        CheckpointError, match=rf"has {len(whole) + change:,} bytes; its header asks for {len(whole):,}"
    ):
        open_source(path)


def test_other_versions_and_headers_are_refused(tmp_path: Path) -> None:
    """int8 (version 2), a header cut short, one with sizes that make no model."""
    path = tmp_path / "model.bin"
    path.write_bytes(version_1(True, version=2))
    with pytest.raises(CheckpointError, match=r"is of version 2 .*expected fp32"):
        open_source(path)
    path.write_bytes(version_1(True)[:100])
    with pytest.raises(CheckpointError, match="has 100 bytes, less than a header"):
        open_source(path)
    whole = version_1(True)
    for place, value in ((20, 0), (20, 3), (20, 32), (8, 2**31 - 1), (16, -1), (28, -ROWS)):
        path.write_bytes(whole[:place] + struct.pack("i", value) + whole[place + 4 :])
        with pytest.raises(CheckpointError, match="does not describe a model"):
            open_source(path)


def test_other_files_are_not_taken_for_one(tmp_path: Path, fake: tuple[str, bytes]) -> None:
    """What a failed download leaves, a PyTorch file, zeros, a legacy header of absurd sizes."""
    path = tmp_path / "model.bin"
    kind, content = fake
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=kind):
        open_source(path)
    torch.save({"a": torch.ones(3)}, path)
    assert not is_llama2c(path)
    whole = legacy(True)
    for place, value in ((0, 2**30), (8, 2**20), (12, 0), (12, 32), (16, 3), (24, -5)):
        path.write_bytes(whole[:place] + struct.pack("i", value) + whole[place + 4 :])
        assert not is_llama2c(path)
    path.write_bytes(bytes(len(whole)))
    assert not is_llama2c(path)
    path.write_bytes(whole)
    assert is_llama2c(path)


def logits(source: Source, layout) -> Tensor:
    """[60, V] of fixed tokens, in fp32."""
    args = model_args_of(source)
    decoder = Decoder(args, dtype=torch.float32)
    tensors = resolve(decoder, [source], Attachment(), initialize=False)
    fill(decoder, tensors, Attachment(), layout, DataParallel(layout, "sdp", base_is_trained=False))
    ids = torch.randint(0, args.vocab_size, (60,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return next_token_logits(decoder.eval(), decoder(ids, decoder.sequences((60,))))
