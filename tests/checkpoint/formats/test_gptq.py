"""GPTQ's files: what is missing or strange in them, and biases of zeros."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from accessory.export import open_whole
from accessory.meta import MetaModel
from tests.checkpoint.formats.low_bit_files import write_dequantized, write_gptq
from tests.checkpoint.formats.low_bit_models import V, changed, logits

SHORT = torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "change", "stated", "message"),
    [
        ("gptq-4", lambda t: t.pop(f"{V}.qzeros"), {}, rf"{V}.qzeros is missing; found .*{V}.scales"),
        ("gptq-4", lambda t: t.pop(f"{V}.g_idx"), {"desc_act": True}, f"{V}.g_idx is missing; expected it, or bits"),
        (
            "gptq-4",
            lambda t: t.update({f"{V}.g_idx": t[f"{V}.g_idx"] + 9}),
            {},
            "names groups 9 to 10; expected 0 to 1",
        ),
        ("gptq-4", lambda t: t[f"{V}.g_idx"][:3].fill_(1), {}, "has groups of unequal sizes; expected 67 channels"),
        (
            "gptq-4",
            lambda t: t.update({f"{V}.scales": SHORT}),
            {},
            r"v_proj.scales is I32 \[2\]; expected F16 of 2 dim",
        ),
        (
            "gptq-4",
            lambda t: t.update({f"{V}.g_idx": t[f"{V}.g_idx"][:64].clone()}),
            {},
            "bits 4 of .*, whose tensors have numbers of 8 bits",
        ),
        (
            "gptq-4",
            lambda t: t.update({f"{V}.qweight": t[f"{V}.qweight"][:10].clone()}),
            {},
            r"of 2\.5 bits; expected 2, 3, 4, 8 bits, or the full",
        ),
        ("gptq-4", lambda t: None, {"checkpoint_format": "marlin"}, "'marlin'; expected one of gptq, gptq_v2"),
    ],
)
def test_what_is_missing_or_strange_is_named(written, tmp_path: Path, name: str, change, stated, message: str) -> None:
    """File, key, what was found and what was expected."""
    with pytest.raises(CheckpointError, match=message):
        open_source(changed(written(name), tmp_path / "damaged", change, **stated))


def test_biases_of_zeros_are_left_out_and_others_kept(written, tmp_path: Path) -> None:
    """AutoGPTQ wrote zeros for linears without a bias; numbers other than zeros would be lost, and are refused."""
    bias = torch.zeros(128, dtype=torch.float16)
    path = changed(written("gptq-4"), tmp_path / "zeros", lambda t: t.update({f"{V[:-6]}o_proj.bias": bias}))
    assert torch.equal(logits(path), logits(written("gptq-4").path))
    path = changed(written("gptq-4"), tmp_path / "ones", lambda t: t.update({f"{V[:-6]}o_proj.bias": bias + 1}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wo\.bias has no place in this model"):
        logits(path)


@pytest.mark.parametrize("how", [{"sym": True}, {"least": 0, "act_order": True}, {"kind": "gptq_v2", "group": -1}])
def test_eight_bits_are_read_as_plain_weights(tiny_base: Path, tmp_path: Path, how: dict) -> None:
    """What the files mean, to the bit, and the same by rows and columns; a run is told, and may pack them again."""
    made = write_gptq(tiny_base, tmp_path / "wide", 8, **how)
    source = open_source(made.path)
    assert source.storage is None
    assert source.notes == ("14 matrices of 8 bits are read as plain weights; --quant packs them again",)
    found = source.tensors["layers.1.feed_forward.w2.weight"]
    whole = torch.from_numpy(made.linears["model.layers.1.mlp.down_proj"].dequantized())
    assert torch.equal(found.read(), whole)
    assert torch.equal(found.read(0, 3, 9), whole[3:9]) and torch.equal(found.read(1, 3, 9), whole[:, 3:9])
    expected = logits(write_dequantized(tiny_base, made, tmp_path / "plain"))
    assert (logits(made.path) - expected).abs().max() < 1e-5 * expected.abs().max()
    again = MetaModel.from_pretrained(made.path, quant=True, quant_type="int4_g64")
    assert again.llma.layers[0].attention.wq.weight.name == "int4_g64"


def test_biases_of_zeros_beside_eight_bits(tiny_base: Path, tmp_path: Path) -> None:
    """They are left out there, too."""
    made = write_gptq(tiny_base, tmp_path / "wide", 8)
    zeros = {f"{V[:-6]}{name}.bias": torch.zeros(128, dtype=torch.float16) for name in ("q_proj", "o_proj")}
    path = changed(made, tmp_path / "zeros", lambda t: t.update(zeros))
    assert not [name for name in open_whole([path])[0].tensors if name.endswith(".bias")]
