"""Directories that GPTQ, AWQ and GreenBit packed: whole numbers stay what they are, and mean what the formats say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint.load import targets
from accessory.checkpoint.opening import open_source
from accessory.data.batch import Document, PackedBatch
from accessory.errors import CheckpointError
from accessory.kernels.codes import whole_numbers
from accessory.meta import MetaModel
from accessory.quant import PackedWeight
from tests.checkpoint.formats import low_bit_files as files
from tests.checkpoint.formats.low_bit_models import OURS, TOKENS, WRITERS, V, changed, converted, logits


def their_linears(model: MetaModel) -> dict[str, PackedWeight]:
    """The packed matrices by their names in the files."""
    back = {ours: theirs for theirs, ours in OURS.items()}
    found = {}
    for target in targets(model.llma):
        weight = getattr(target.owner, target.leaf)
        if isinstance(weight, PackedWeight):
            _, number, module = target.name.removesuffix(".weight").split(".", 2)
            found[f"model.layers.{number}.{back[module]}"] = weight
    return found


def numbers_by_channel(weight: PackedWeight) -> Tensor:
    """Whole numbers [N, K], columns by input channel."""
    codes = weight.as_codes()
    numbers = whole_numbers(codes.codes, codes.high, codes.bits, codes.shape[1])
    if codes.order is None:
        return numbers
    return torch.empty_like(numbers).index_copy_(1, codes.order.long(), numbers)


@pytest.mark.parametrize("name", WRITERS)
def test_whole_numbers_and_logits(written, tiny_base: Path, tmp_path: Path, name: str) -> None:
    """Every number is the file's, every weight what the format says, and the logits those of the plain model."""
    made = written(name)
    model = MetaModel.from_pretrained(made.path, dtype="fp32")
    linears = their_linears(model)
    assert linears.keys() == made.linears.keys() and len(linears) == 14
    for key, linear in made.linears.items():
        assert np.array_equal(numbers_by_channel(linears[key]).numpy(), linear.by_channel()), key
        expected = linear.dequantized() * made.channel_scales.get(key, np.float32(1))
        assert np.abs(linears[key].unpack(torch.float32).numpy() - expected).max() < 1e-6, key
    expected = logits(files.write_dequantized(tiny_base, made, tmp_path / "plain"))
    assert (model.logits(TOKENS, (40,)) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "name", ["gptq-4-act", "gptq_v2-3", "gptq_v2-2-rows", "awq", "greenbit", "greenbit-channel-mix"]
)
def test_lora_learns_beside_it_as_beside_plain_weights(written, tiny_base: Path, tmp_path: Path, name: str) -> None:
    """Losses and what is learned are those beside the plain model; what is saved finds its base again."""
    made = written(name)
    plain = files.write_dequantized(tiny_base, made, tmp_path / "plain")
    (ours, losses), (theirs, expected) = (trained(path) for path in (made.path, plain))
    assert losses == pytest.approx(expected, rel=1e-4) and losses[-1] < losses[0] - 0.01
    found, wanted = ours.get_trainable_params(), theirs.get_trainable_params()
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-2, atol=2e-4)
    ours.save(tmp_path / "part")
    again = MetaModel.from_pretrained(tmp_path / "part", dtype="fp32")
    assert torch.equal(again.logits(TOKENS, (40,)), ours.eval().logits(TOKENS, (40,)))


def trained(base: Path) -> tuple[MetaModel, list[float]]:
    """A model whose LoRA and norms were trained in a few steps, and the losses."""
    how = {"llama_type": "llama_peft", "llama_config": {"lora_rank": 4, "lora_alpha": 8}}
    model = MetaModel.from_pretrained(base, train=True, dtype="fp32", seed=2, **how)
    optimizer = torch.optim.AdamW(model.get_trainable_params().values(), lr=3e-3, weight_decay=0.0)
    document = Document(TOKENS.numpy(), np.roll(TOKENS.numpy(), -1), 0)
    losses = []
    for _ in range(4):
        batch = PackedBatch.pack([document])
        loss = model(batch) / batch.supervised
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


def test_config_of_its_own_file(written, tmp_path: Path) -> None:
    """AutoAWQ's quant_config.json says what config.json does elsewhere."""
    path = Path(shutil.copytree(written("awq").path, tmp_path / "own_file"))
    config = json.loads((path / "config.json").read_text())
    stated = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quant_config.json").write_text(json.dumps(stated))
    assert torch.equal(logits(path), logits(written("awq").path))


@pytest.mark.parametrize(
    ("name", "packing"),
    [("gptq-4", "auto_round:auto_gptq"), ("gptq_v2-3", "auto_round:gptqmodel"), ("gptq_v2-3", "auto_round"),
     ("awq", "auto_round:auto_awq")],
)  # fmt: skip
def test_auto_round_packs_as_others_do(written, tmp_path: Path, name: str, packing: str) -> None:
    """Under names of its own; a layout that is none of these is refused by name."""
    keys = {"quant_method": "auto-round", "packing_format": packing, "checkpoint_format": None, "version": None}
    path = changed(written(name), tmp_path / "auto_round", lambda t: None, **keys)
    assert torch.equal(logits(path), logits(written(name).path))
    keys["packing_format"] = "auto_round:auto_gpt"
    other = changed(written(name), tmp_path / "other", lambda t: None, **keys)
    with pytest.raises(
        CheckpointError, match=r"'auto_round:auto_gpt' of AutoRound; .*Did you mean 'auto_round:auto_gptq'"
    ):
        open_source(other)


def test_a_quant_method_that_is_no_word_is_refused(written, tmp_path: Path) -> None:
    """A list in its place."""
    path = changed(written("awq"), tmp_path / "list", lambda t: None, quant_method=["awq"])
    with pytest.raises(CheckpointError, match=r"quantized by \['awq'\], which cannot be read"):
        open_source(path)


@pytest.mark.parametrize("value", ["inf", "nan"])
@pytest.mark.parametrize(
    ("name", "part"),
    [("gptq-4", "scales"), ("awq", "scales"), ("greenbit", "zeros"), ("greenbit", "channel_scale"),
     ("greenbit-channel-mix", "scales"), ("greenbit-two-levels", "qscales_scales"),
     ("greenbit-two-levels", "qzeros_zeros")],
)  # fmt: skip
def test_statistics_that_are_not_finite_are_refused(written, tmp_path: Path, name: str, part: str, value: str) -> None:
    """File and tensor are named; one such number would make every logit NaN."""
    path = changed(written(name), tmp_path / "damaged", lambda t: t[f"{V}.{part}"].view(-1)[3:4].fill_(float(value)))
    with pytest.raises(CheckpointError, match=rf"damaged: {V}\.{part} holds {value} in 1 of \d+ places; expected fin"):
        logits(path)


def test_such_statistics_in_our_own_files(written, tmp_path: Path) -> None:
    """As in others'; and a product of two levels that fp16 cannot hold."""
    own = converted(written("greenbit-plain").path, tmp_path / "own", "accessory")
    stored = load_file(own / "model.safetensors")
    stored["layers.1.attention.wo.weight.zeros"][0, 0] = float("-inf")
    save_file(stored, own / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"own: layers\.1\.attention\.wo\.weight: its zeros holds -inf in 1 of"):
        logits(own)
    path = changed(written("greenbit-two-levels"), tmp_path / "large", lambda t: t[f"{V}.qscales_scales"].fill_(6e4))
    with pytest.raises(CheckpointError, match=rf"{V}\.weight: its scales holds -?inf"):
        logits(path)


@pytest.mark.parametrize("own_library", [True, False])
def test_hqq_is_refused_with_what_to_do_instead(tiny_base: Path, tmp_path: Path, own_library: bool) -> None:
    """As its own library and as transformers write it."""
    path = Path(shutil.copytree(tiny_base, tmp_path / "hqq"))
    if own_library:
        (path / "model.safetensors").rename(path / "qmodel.pt")
    else:
        config = json.loads((path / "config.json").read_text())
        stated = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}}}
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))
    with pytest.raises(
        CheckpointError, match=r"by HQQ, .* full-precision checkpoint instead, with --quant --quant_type"
    ):
        open_source(path)
