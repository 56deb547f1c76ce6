"""Directories that GPTQ, AWQ and GreenBit packed: whole numbers stay what they are, and mean what the formats say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.load import targets
from accessory.checkpoint.opening import open_source
from accessory.data.batch import Document, PackedBatch
from accessory.errors import CheckpointError
from accessory.export import Destination, open_whole
from accessory.kernels.codes import whole_numbers
from accessory.meta import MetaModel
from accessory.quant import PackedWeight
from tests.checkpoint.formats import low_bit_files as files
from tests.checkpoint.formats.low_bit_files import Written

TOKENS = torch.arange(40) * 7 % 500
OURS = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}  # fmt: skip
THEIRS = dict(zip(OURS, ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up"), strict=True))
"""Their name of a linear -> llama.cpp's."""
WRITERS: dict[str, Callable[..., Written]] = {
    "gptq-4-sym": lambda *at: files.write_gptq(*at, 4, 32, sym=True),
    "gptq-4": lambda *at: files.write_gptq(*at, 4, 64),
    "gptq-4-zero-points": lambda *at: files.write_gptq(*at, 4, 32, least=0),
    "gptq-4-act": lambda *at: files.write_gptq(*at, 4, 32, act_order=True),
    "gptq-3-act": lambda *at: files.write_gptq(*at, 3, 64, act_order=True, least=0),
    "gptq_v2-3": lambda *at: files.write_gptq(*at, 3, 32, kind="gptq_v2", least=0),
    "gptq-2": lambda *at: files.write_gptq(*at, 2, 64),
    "gptq_v2-2-rows": lambda *at: files.write_gptq(*at, 2, -1, kind="gptq_v2", least=0),
    "awq": files.write_awq,
    "greenbit": files.write_greenbit,
    "greenbit-plain": lambda *at: files.write_greenbit(*at, plain=True),
    "greenbit-two-levels": files.write_two_levels,
    "greenbit-channel-mix": files.write_channel_mix,
}


@pytest.fixture(scope="module")
def written(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Written]:
    """A name of `WRITERS` -> the tiny model, as that writes it."""
    made: dict[str, Written] = {}

    def write(name: str) -> Written:
        if name not in made:
            made[name] = WRITERS[name](tiny_base, tmp_path_factory.mktemp("low_bit") / name)
        return made[name]

    return write


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


def logits(path: Path) -> Tensor:
    """What the model at `path` computes of `TOKENS`, in fp32."""
    return MetaModel.from_pretrained(path, dtype="fp32").logits(TOKENS, (40,))


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


def converted(source: Path, target: Path, to: str) -> Path:
    """`source` written as another format."""
    model, _, _ = open_whole([source])
    Destination(to, "fp32").write(model, target)
    return target


@pytest.mark.parametrize("name", WRITERS)
def test_round_trip_by_way_of_ours(written, tmp_path: Path, name: str) -> None:
    """Relabelled as ours, and back into the layout it came in, no bit of a matrix changes."""
    made = written(name)
    own = converted(made.path, tmp_path / "own", "accessory")
    assert torch.equal(logits(own), logits(made.path))
    to = {"gptq": "gptq", "awq": "gptq"}.get(name.split("-")[0].split("_")[0], "greenbit")
    back = converted(own, tmp_path / "back", to)
    assert torch.equal(logits(back), logits(made.path))
    before, after = (load_file(path / "model.safetensors") for path in (made.path, back))
    if to == "gptq" and name != "gptq-4-sym":  # where gptqmodel takes other zero points from others than itself
        assert json.loads((back / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    if name in ("gptq-4", "gptq-4-zero-points", "gptq-4-act", "gptq-3-act", "gptq-2"):
        points = [{key: tensor.read_packed()["points"] for key, tensor in open_source(path).tensors.items()
                   if isinstance(tensor, PackedTensor)} for path in (made.path, back)]  # fmt: skip
        assert len(points[0]) == 14 and all(torch.equal(value, points[1][key]) for key, value in points[0].items())
        before, after = ({k: v for k, v in found.items() if not k.endswith(".qzeros")} for found in (before, after))
    if name in ("awq", "greenbit-two-levels", "greenbit-channel-mix"):  # no layout that we write
        return
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    if to == "greenbit":
        strategies = [json.loads((path / "quant_strategy.json").read_text()) for path in (made.path, back)]
        said = [{b: {n: (e["bits"], e["group_size"][str(e["bits"][0])]) for n, e in block.items()}
                 for b, block in strategy["measurement"].items()} for strategy in strategies]  # fmt: skip
        assert said[0] == said[1]


def test_two_ranks_hold_slices_of_the_same_weights(written, torchrun) -> None:
    """Of rows and of columns, also where channels lie in another order, and where a cut goes through a group."""
    paths = [written(name).path for name in WRITERS]
    for path in paths:
        torch.save(logits(path), path / "logits.pt")
    done = torchrun(2, Path(__file__).parent / "low_bit_worker.py", *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in paths:
        assert done.stdout.count(f"{path.name}: matrices 14 equal, logits close\n") == 2, done.stdout


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


def changed(made: Written, target: Path, change: Callable[[dict[str, Tensor]], object], **stated: object) -> Path:
    """A copy whose tensors are changed in place; stated: keys of its quantization_config."""
    path = Path(shutil.copytree(made.path, target))
    stored = load_file(path / "model.safetensors")
    change(stored)
    save_file(stored, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    if stated:
        config["quantization_config"] |= stated
    (path / "config.json").write_text(json.dumps(config))
    return path


V = "model.layers.0.self_attn.v_proj"
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
            "numbers of 8.0 bits; expected 2",
        ),
        ("gptq-4", lambda t: None, {"checkpoint_format": "marlin"}, "'marlin'; expected one of gptq, gptq_v2"),
        ("awq", lambda t: None, {"version": "gemv"}, "version 'gemv' and 4 bits; expected gemm and 4"),
        ("awq", lambda t: t.pop(f"{V}.scales"), {}, f"{V}.scales is missing"),
        ("awq", lambda t: t.update({f"{V}.qzeros": t[f"{V}.qzeros"][:1].clone()}), {}, r"\[1, 8\]; expected \[4, 8\]"),
        ("awq", lambda t: None, {"quant_method": "awk"}, "'awk', which cannot be read; .* Did you mean 'awq'"),
        ("greenbit", lambda t: t.pop(f"{V}.q_perm"), {}, f"{V}.q_perm is missing"),
        ("greenbit", lambda t: t[f"{V}.q_perm"][:2].fill_(3), {}, f"{V}.q_perm names a channel twice"),
        (
            "greenbit",
            lambda t: t.update({f"{V}.zeros": t[f"{V}.scales"].repeat(2, 1)}),
            {},
            f"{V}.zeros and scales have",
        ),
        ("greenbit-channel-mix", lambda t: t[f"{V}.q_groups"][:1].fill_(8), {}, f"{V}.qweight holds numbers of 8 bits"),
        ("greenbit-two-levels", lambda t: t.pop(f"{V}.qscales_zeros"), {}, f"{V}.qscales_zeros is missing"),
    ],
)
def test_what_is_missing_or_strange_is_named(written, tmp_path: Path, name: str, change, stated, message: str) -> None:
    """File, key, what was found and what was expected."""
    with pytest.raises(CheckpointError, match=message):
        open_source(changed(written(name), tmp_path / "damaged", change, **stated))


def test_a_strategy_that_contradicts_its_tensors_is_refused(written, tmp_path: Path) -> None:
    """quant_strategy.json and the words of a matrix have to agree on bits and groups."""
    path = changed(written("greenbit"), tmp_path / "strategy", lambda t: None)
    strategy = json.loads((path / "quant_strategy.json").read_text())
    strategy["measurement"]["model.layers.0"]["v_proj"]["bits"] = [2]
    (path / "quant_strategy.json").write_text(json.dumps(strategy))
    with pytest.raises(
        CheckpointError, match=r"says 2 bits in groups of 128 of model.layers.0.v_proj; .* 4 bits in 1 gr"
    ):
        open_source(path)


def test_biases_of_zeros_are_left_out_and_others_kept(written, tmp_path: Path) -> None:
    """AutoGPTQ wrote zeros for linears without a bias; numbers other than zeros would be lost, and are refused."""
    bias = torch.zeros(128, dtype=torch.float16)
    path = changed(written("gptq-4"), tmp_path / "zeros", lambda t: t.update({f"{V[:-6]}o_proj.bias": bias}))
    assert torch.equal(logits(path), logits(written("gptq-4").path))
    path = changed(written("gptq-4"), tmp_path / "ones", lambda t: t.update({f"{V[:-6]}o_proj.bias": bias + 1}))
    with pytest.raises(CheckpointError, match=r"layers\.0\.attention\.wo\.bias has no place in this model"):
        logits(path)


def test_scales_in_bf16_are_taken_where_fp16_has_them(written, tmp_path: Path) -> None:
    """gptqmodel writes AWQ's in the model's dtype; a number that fp16 has not is refused, not rounded."""
    key = f"{V}.scales"
    halves = {key: load_file(written("awq").path / "model.safetensors")[key].bfloat16()}
    first = changed(written("awq"), tmp_path / "bf16", lambda t: t.update(halves))
    second = changed(written("awq"), tmp_path / "fp16", lambda t: t.update({key: halves[key].half()}))
    assert torch.equal(logits(first), logits(second))
    large = {key: torch.full_like(halves[key], 1e6)}
    with pytest.raises(CheckpointError, match=rf"{key} holds BF16 numbers that fp16 does not have"):
        logits(changed(written("awq"), tmp_path / "large", lambda t: t.update(large)))


def test_config_of_its_own_file(written, tmp_path: Path) -> None:
    """AutoAWQ's quant_config.json says what config.json does elsewhere."""
    path = Path(shutil.copytree(written("awq").path, tmp_path / "own_file"))
    config = json.loads((path / "config.json").read_text())
    stated = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quant_config.json").write_text(json.dumps(stated))
    assert torch.equal(logits(path), logits(written("awq").path))


def test_what_a_layout_cannot_hold_is_refused(written, tiny_base: Path, tmp_path: Path) -> None:
    """By name, with what to do instead."""
    for source, to, message in (
        (written("greenbit").path, "gptq", "has a scale for each input channel, which GPTQ's files have no place for"),
        (written("greenbit-plain").path, "gptq", "zeros that are no whole multiples of their scales"),
        (written("gptq_v2-3").path, "greenbit", "has numbers of 3 bits; GreenBit's files hold 2 and 4"),
        (written("gptq-4").path, "hf", "int4_g64 matrices have no place .*--to accessory, gptq or greenbit"),
        (tiny_base, "gptq", "--to gptq holds whole numbers in groups; nothing is packed"),
    ):
        with pytest.raises(CheckpointError, match=message):
            converted(source, tmp_path / "refused", to)
        assert not (tmp_path / "refused").exists()


def test_zeros_that_fp16_rounds_are_told(written, tmp_path: Path, capfd) -> None:
    """GreenBit's zeros are fp16: whole points times scales are rounded to that, and the weights with them."""
    target = converted(written("gptq-4").path, tmp_path / "greenbit", "greenbit")
    assert "zeros are rounded to fp16, by at most" in capfd.readouterr().out
    expected = logits(written("gptq-4").path)
    assert 0 < (logits(target) - expected).abs().max() < 0.01 * expected.abs().max()
    converted(written("gptq-4-sym").path, tmp_path / "exact", "greenbit")
    assert "rounded" not in capfd.readouterr().out
    assert torch.equal(logits(tmp_path / "exact"), logits(written("gptq-4-sym").path))


def test_mixed_widths_go_into_gptq_with_exceptions(written, tmp_path: Path) -> None:
    """gptqmodel's `dynamic` says which linears are packed otherwise, or not."""

    def mix(stored: dict[str, Tensor]) -> None:
        """v in 4 bits, up plain, others in 2."""
        wide = load_file(written("gptq-4").path / "model.safetensors")
        stored |= {key: value for key, value in wide.items() if "v_proj" in key}
        for key in [key for key in stored if "up_proj" in key]:
            del stored[key]
        stored |= {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(256, 128) for i in range(2)}

    source = changed(written("gptq-2"), tmp_path / "mixed", mix)
    back = converted(source, tmp_path / "back", "gptq")
    stated = json.loads((back / "config.json").read_text())["quantization_config"]
    assert (stated["bits"], stated["group_size"]) == (2, 64)
    assert stated["dynamic"] == {
        f"{sign}:model\\.layers\\.{i}\\.{name}": said
        for i in range(2)
        for sign, name, said in (("-", "mlp\\.up_proj", {}), ("+", "self_attn\\.v_proj", {"bits": 4, "group_size": 64}))
    }
    assert torch.equal(logits(back), logits(source))


@pytest.mark.parametrize(
    ("name", "kinds", "in_f16"),
    [
        ("gptq-4-sym", {Kind.Q4_0}, 0),
        ("gptq-2", {Kind.Q4_0}, 0),
        ("gptq_v2-2-rows", {Kind.Q4_0}, 0),
        ("gptq-4", {Kind.Q8_0, Kind.Q4_0}, 0),
        ("awq", {Kind.Q8_0}, 0),
        ("greenbit-plain", {Kind.Q4_1}, 0),
        ("greenbit-two-levels", {Kind.Q4_1}, 0),
        ("gptq-4-act", {Kind.F16}, 14),
        ("greenbit", {Kind.F16, Kind.Q4_1}, 12),
    ],
)
def test_gguf_keeps_numbers_exactly_or_says_so(written, tmp_path: Path, capfd, name: str, kinds, in_f16: int) -> None:
    """The gguf package unpacks to the bit what the packed matrices mean; others are F16, and counted."""
    made, target = written(name), tmp_path / "model.gguf"
    model, _, _ = open_whole([made.path])
    Destination("gguf", gguf_type="packed").write(model, target)
    said = re.search(r"holds (\d+) of 14 packed matrices exactly", capfd.readouterr().out)
    assert (int(said[1]) if said else 0) == in_f16
    tensors = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    rotated = ("self_attn.q_proj", "self_attn.k_proj")  # their rows lie in llama.cpp's order: the logits tell
    linears = {
        f"model.layers.{i}.{theirs}": tensors[f"blk.{i}.{THEIRS[theirs]}.weight"]
        for i in range(2)
        for theirs in OURS
        if theirs not in rotated
    }
    assert {tensor.tensor_type for tensor in linears.values()} <= kinds
    for key, tensor in linears.items():
        weight = made.linears[key].dequantized() * made.channel_scales.get(key, np.float32(1))
        unpacked = dequantize(tensor.data, tensor.tensor_type)
        close = 1e-3 if tensor.tensor_type == Kind.F16 else 1e-6
        assert np.abs(unpacked - weight).max() <= close * np.abs(weight).max(), key
    expected = logits(made.path)
    assert (logits(target) - expected).abs().max() < (1e-2 if in_f16 else 2e-3) * expected.abs().max()
