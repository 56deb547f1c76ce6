"""Their weights as ours and back: names, matrices that stand in one, and rows of either rotary layout."""

from __future__ import annotations

import pytest
import torch

from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.naming import (
    BLOCK_LINEAR,
    in_rotary_layout,
    ours_from_theirs,
    part_rows,
    rotary_rows,
    theirs_from_ours,
)
from accessory.errors import CheckpointError
from accessory.model.args import ModelArgs
from accessory.model.families.architecture import Fused, Names

ARGS = ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=6, vocab_size=8)  # heads of 8 channels
UNGROUPED = ARGS.model_copy(update={"n_kv_heads": 4})
QKV = ("attention.wq", "attention.wk", "attention.wv")
NAMES = Names(
    outer={"embed": "tok_embeddings", "head": "output"},
    block="h.{}.",
    inner={
        "qkv": Fused(QKV, "kv_heads"),
        "dense": "attention.wo",
        "gate_up": Fused(("feed_forward.w1", "feed_forward.w3")),
    },
)  # fmt: skip


def numbered(rows: int, columns: int = 3) -> torch.Tensor:
    """A matrix whose values tell the row."""
    return torch.arange(rows)[:, None] * 100.0 + torch.arange(columns)


@pytest.mark.parametrize(("rotary_dim", "halves"), [
    (8, [0, 2, 4, 6, 1, 3, 5, 7]), (4, [0, 2, 1, 3, 4, 5, 6, 7]), (2, [0, 1, 2, 3, 4, 5, 6, 7]),
])  # fmt: skip
def test_rotary_rows(rotary_dim: int, halves: list[int]) -> None:
    """By hand for one head of 8 channels; the second head after it; each way undoes the other."""
    to_halves, to_pairs = (rotary_rows(2, 8, rotary_dim, wanted) for wanted in ("halves", "pairs"))
    assert to_halves.tolist() == halves + [8 + i for i in halves]
    assert torch.equal(to_halves[to_pairs], torch.arange(16))
    assert torch.equal(to_pairs[to_halves], torch.arange(16))


def test_rows_are_transformers_permutation() -> None:
    """transformers' own formula in its LLaMA conversion leads from Meta's rows to its own."""
    heads, width, columns = 4, 8, 6
    meta = torch.arange(float(heads * width * columns)).view(heads * width, columns)
    theirs = meta.view(heads, width // 2, 2, columns).transpose(1, 2).reshape(heads * width, columns)
    assert not torch.equal(theirs, meta)
    assert torch.equal(meta[rotary_rows(heads, width, width, "halves")], theirs)
    assert torch.equal(theirs[rotary_rows(heads, width, width, "pairs")], meta)


def test_what_is_turned() -> None:
    """q and k with biases, LoRA's out factors and head norms, each by its heads; nothing else, lora_a least of all."""
    q, k = rotary_rows(4, 8, 8, "pairs"), rotary_rows(2, 8, 8, "pairs")
    turned = {
        "attention.wq.weight": q, "attention.wq.bias": q, "attention.wq.lora_b.weight": q, "attention.wk.weight": k,
        "attention.wk.bias": k, "attention.wk.scale": k, "attention.wk.lora_b.weight": k,
        "attention.q_norm.weight": q[:8], "attention.k_norm.weight": q[:8],
    }  # fmt: skip
    kept = ("attention.wv.weight", "attention.wo.weight", "attention.wq.lora_a.weight", "attention_norm.weight",
            "feed_forward.w1.weight", "attention.wv.lora_b.weight")  # fmt: skip
    tensors = {f"layers.1.{name}": HeldTensor(numbered(len(rows))) for name, rows in turned.items()}
    tensors |= {f"layers.1.{name}": HeldTensor(numbered(32)) for name in kept}
    found = in_rotary_layout(tensors, ARGS, "halves", "pairs")
    assert found.keys() == tensors.keys()
    for name, rows in turned.items():
        assert torch.equal(found[f"layers.1.{name}"].read(), numbered(len(rows))[rows]), name
    for name in kept:
        assert found[f"layers.1.{name}"] is tensors[f"layers.1.{name}"]
    side = {"side.1.attention.wq.weight": HeldTensor(numbered(8))}  # narrower, and in one layout always
    assert in_rotary_layout(side, ARGS, "halves", "pairs") == side
    again = in_rotary_layout(found, ARGS, "pairs", "halves")
    assert all(torch.equal(again[name].read(), tensor.read()) for name, tensor in tensors.items())


def test_what_is_not_rotary_is_not_turned() -> None:
    """Nor what is in the layout that is wanted."""
    tensors = {"layers.0.attention.wq.weight": HeldTensor(numbered(32))}
    alibi = ARGS.model_copy(update={"position": "alibi"})
    assert in_rotary_layout(tensors, alibi, "halves", "pairs") == tensors
    assert in_rotary_layout(tensors, ARGS, "pairs", "pairs") == tensors


def heads_of(first: int, *widths: int) -> list[int]:
    """`widths` rows from `first` on."""
    return list(range(first, first + sum(widths)))


@pytest.mark.parametrize(("groups", "args", "wanted"), [
    ("whole", ARGS, [heads_of(0, 32), heads_of(32, 16), heads_of(48, 16)]),
    ("kv_heads", ARGS, [heads_of(0, 16) + heads_of(32, 16), heads_of(16, 8) + heads_of(48, 8),
                        heads_of(24, 8) + heads_of(56, 8)]),
    ("heads", UNGROUPED, [[row for head in range(4) for row in heads_of(24 * head + 8 * i, 8)] for i in range(3)]),
])  # fmt: skip
def test_rows_of_fused_matrices(groups: str, args: ModelArgs, wanted: list[list[int]]) -> None:
    """One below the other, by key/value head (q x G, k, v) and by head (q, k, v): by hand."""
    assert [rows.tolist() for rows in part_rows(Fused(QKV, groups), args)] == wanted


@pytest.mark.parametrize("groups", ["whole", "kv_heads", "heads"])
def test_ranks_read_their_slices_of_fused_matrices(groups: str) -> None:
    """Two ranks' ranges along both dimensions are those of the matrices cut out of the whole."""
    args = UNGROUPED if groups == "heads" else ARGS
    fused = Fused(QKV, groups)
    rows = part_rows(fused, args)
    whole = numbered(sum(map(len, rows)), 4)
    names = Names(outer={}, block="h.{}.", inner={"qkv": fused})
    ours = ours_from_theirs(
        {"h.1.qkv.weight": HeldTensor(whole), "h.1.qkv.bias": HeldTensor(whole[:, 0])}, names, args, ""
    )
    assert set(ours) == {f"layers.1.{part}.{leaf}" for part in QKV for leaf in ("weight", "bias")}
    for part, its in zip(QKV, rows, strict=True):
        half = len(its) // 2
        for rank in range(2):
            mine = its[rank * half : (rank + 1) * half]
            weight, bias = (ours[f"layers.1.{part}.{leaf}"] for leaf in ("weight", "bias"))
            assert torch.equal(weight.read(0, rank * half, (rank + 1) * half), whole[mine])
            assert torch.equal(weight.read(1, 2 * rank, 2 * rank + 2), whole[its, 2 * rank : 2 * rank + 2])
            assert torch.equal(bias.read(0, rank * half, (rank + 1) * half), whole[mine, 0])


def test_names_both_ways() -> None:
    """Blocks, what stands once, what carries nothing, and strangers, which keep their names to be complained about."""
    theirs = {
        "embed.weight": numbered(8), "head.weight": numbered(8), "h.0.qkv.weight": numbered(64),
        "h.1.dense.weight": numbered(32), "h.0.gate_up.weight": numbered(12), "h.0.rotary_emb.inv_freq": numbered(4),
        "h.0.odd.weight": numbered(2), "g.0.dense.weight": numbered(2),
    }  # fmt: skip
    ours = ours_from_theirs({name: HeldTensor(value) for name, value in theirs.items()}, NAMES, ARGS, "here")
    assert set(ours) == {
        "tok_embeddings.weight", "output.weight", *(f"layers.0.{part}.weight" for part in QKV),
        "layers.1.attention.wo.weight", "layers.0.feed_forward.w1.weight", "layers.0.feed_forward.w3.weight",
        "h.0.odd.weight", "g.0.dense.weight",
    }  # fmt: skip
    known = {name: tensor for name, tensor in ours.items() if name[0] not in "hg"}
    back = theirs_from_ours(known, NAMES, ARGS)
    assert list(back) == ["embed.weight", "h.0.qkv.weight", "h.0.gate_up.weight", "h.1.dense.weight", "head.weight"]
    assert all(torch.equal(tensor.read(), theirs[name]) for name, tensor in back.items())


def test_a_tied_head_is_left_out() -> None:
    """Beside the embedding that it is tied to it would have no place."""
    tied = ARGS.model_copy(update={"tie_word_embeddings": True})
    tensors = {"embed.weight": HeldTensor(numbered(8)), "head.weight": HeldTensor(numbered(8))}
    assert set(ours_from_theirs(tensors, NAMES, tied, "here")) == {"tok_embeddings.weight"}


def test_a_fused_matrix_that_does_not_fit() -> None:
    """Named as in its file, with both numbers."""
    with pytest.raises(
        CheckpointError, match=r"^here: h\.0\.qkv\.weight has shape \(63, 3\); its settings ask for 64 rows\.$"
    ):
        ours_from_theirs({"h.0.qkv.weight": HeldTensor(numbered(63))}, NAMES, ARGS, "here")


def test_linears_that_are_packed() -> None:
    """The seven matrices of a block, whole names only."""
    assert BLOCK_LINEAR.fullmatch("layers.11.attention.wq.weight") and BLOCK_LINEAR.fullmatch(
        "layers.0.feed_forward.w3.weight"
    )
    for name in ("layers.0.attention.wq.bias", "layers.0.attention_norm.weight", "output.weight", "x.norm.weight",
                 "layers.0.attention.wq.lora_a.weight", "layers.0.feed_forward.w4.weight"):  # fmt: skip
        assert not BLOCK_LINEAR.fullmatch(name)
