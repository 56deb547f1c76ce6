"""Our own packed bases: what packing once writes is what packing at every start would hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from accessory.checkpoint import save
from accessory.checkpoint.load import targets
from accessory.config import FinetuneConfig
from accessory.errors import CheckpointError, ConfigError
from accessory.export import Destination, open_base
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from accessory.quant import STORAGES, PackedWeight
from accessory.run.status import STATUS_FILE
from tests.conftest import DATA

TOKENS = torch.arange(40) * 7 % 500
NAME = "layers.1.feed_forward.w2.weight"


def pack(base: Path, target: Path, quant_type: str = "nf4", dtype: str = "fp32") -> Path:
    """`base` packed in our format."""
    Destination(dtype=dtype, quant_type=quant_type).write(open_base([base])[0], target)
    return target


@pytest.fixture(scope="module")
def packed(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in NF4."""
    return pack(tiny_base, tmp_path_factory.mktemp("packed") / "base")


def states(model: MetaModel) -> dict[str, dict[str, Tensor]]:
    """Name of each packed matrix -> its codes and statistics."""
    found = {}
    for target in targets(model.llma):
        weight = getattr(target.owner, target.leaf)
        if isinstance(weight, PackedWeight):
            found[target.name] = dict(weight.named_parameters())
    return found


@pytest.mark.parametrize("quant_type", STORAGES)
def test_same_bits_as_packing_at_load(tiny_base: Path, tmp_path: Path, quant_type: str) -> None:
    """Codes, statistics and logits, in every storage format; neither flag nor setting is needed."""
    path = pack(tiny_base, tmp_path / "out", quant_type)
    once = MetaModel.from_pretrained(path, dtype="fp32")
    anew = MetaModel.from_pretrained(tiny_base, dtype="fp32", quant=True, quant_type=quant_type)
    first, second = states(once), states(anew)
    assert first.keys() == second.keys() and len(first) == 14
    for name, state in second.items():
        assert first[name].keys() == state.keys()
        assert all(torch.equal(first[name][part], value) for part, value in state.items()), name
    assert torch.equal(once.logits(TOKENS, (40,)), anew.logits(TOKENS, (40,)))


def test_file_holds_bitsandbytes_bytes(tiny_base: Path, packed: Path) -> None:
    """Those of the original matrix; embedding, head and norms are plain; meta.json names each packed one."""
    stored = load_file(packed / "model.safetensors")
    original = load_file(tiny_base / "model.safetensors")
    codes, state = bnb.quantize_4bit(
        original["model.layers.1.mlp.down_proj.weight"], blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(stored[f"{NAME}.codes"], codes.flatten())
    assert torch.equal(stored[f"{NAME}.scales"], state.absmax)
    assert torch.equal(stored[f"{NAME}.nested_scales"], state.state2.absmax)
    assert torch.equal(stored[f"{NAME}.offset"], state.offset.view(1))
    assert torch.equal(stored["output.weight"], original["lm_head.weight"])
    meta = json.loads((packed / "meta.json").read_text())
    assert meta["llama_type"] == "llama" and len(meta["packed"]) == 14
    assert meta["packed"][NAME] == {"quant_type": "nf4", "shape": [128, 256]}
    assert len(stored) == 7 + 4 * 14


def test_size(tiny_base: Path, tmp_path: Path) -> None:
    """Half a byte a weight, and an eighth of a bit and a half of statistics; the rest in bf16."""
    path = pack(tiny_base, tmp_path / "out", dtype="bf16")
    linears = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128)
    plain = 2 * (2 * 512 * 128 + 5 * 128)
    size = sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values())
    assert size < plain + linears / 2 + linears / 64 + 14 * 4 * 3


def test_sharded(tiny_base: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix and its statistics may lie in different files."""
    monkeypatch.setattr(save, "SHARD_BYTES", 50_000)
    path = pack(tiny_base, tmp_path / "out")
    assert len(list(path.glob("model*.safetensors"))) > 3
    first, second = (states(MetaModel.from_pretrained(p, dtype="fp32")) for p in (packed, path))
    assert all(torch.equal(first[name][part], second[name][part]) for name in first for part in first[name])


def test_variants_of_groups_are_written_as_they_are(tiny_base: Path, tmp_path: Path) -> None:
    """One matrix with points and an order beside others without: read, asked, written again to the bit."""
    path = pack(tiny_base, tmp_path / "out", "int4_g64")
    file = path / "model.safetensors"
    stored = load_file(file)
    zeros, scales = stored.pop(f"{NAME}.zeros"), stored[f"{NAME}.scales"]
    stored[f"{NAME}.points"] = (zeros / scales).round().clamp(0, 15).byte()
    stored[f"{NAME}.order"] = torch.randperm(256, generator=torch.Generator().manual_seed(0)).int()
    save_file(stored, file)
    weight = MetaModel.from_pretrained(path, dtype="fp32").llma.get_submodule(NAME)
    assert weight.has("points") and weight.has("order") and not weight.has("zeros")
    codes = torch.stack([weight.codes & 15, weight.codes >> 4], 2).flatten(1).double()
    points, scales = (part.double().repeat_interleave(64, 1) for part in (weight.points, weight.scales))
    wanted = ((codes - points) * scales)[:, weight.order.argsort()]
    torch.testing.assert_close(weight.unpack(torch.float32).double(), wanted, rtol=2**-22, atol=0)
    again = load_file(pack(path, tmp_path / "again", "int4_g64") / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[name], value) for name, value in stored.items())


@pytest.mark.parametrize(
    ("part", "wrong"), [("codes", torch.zeros(128, 255, dtype=torch.int8)), ("scales", torch.zeros(128).half())]
)
def test_int8_parts_that_do_not_fit(tiny_base: Path, tmp_path: Path, part: str, wrong: Tensor) -> None:
    """Named, with what was expected."""
    path = pack(tiny_base, tmp_path / "out", "int8")
    file = path / "model.safetensors"
    save_file(load_file(file) | {f"{NAME}.{part}": wrong}, file)
    with pytest.raises(CheckpointError, match=rf"{NAME} has {part} of type .* and shape .*; expected"):
        MetaModel.from_pretrained(path)


def test_int8_has_no_place_in_hugging_face_files(tiny_base: Path, tmp_path: Path) -> None:
    """Whether it is packed on the way or lies packed; unpacked by merging, it may go anywhere."""
    packed = pack(tiny_base, tmp_path / "packed", "int8")
    for source, destination in (
        (tiny_base, Destination("hf", quant_type="int8")),
        (packed, Destination("hf")),
    ):
        with pytest.raises(CheckpointError, match="int8 matrices have no place in Hugging Face files"):
            destination.write(open_base([source])[0], tmp_path / "hf")
        assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(("asked", "fits"), [("nf4", True), ("nf4_single", False), ("fp4", False)])
def test_storage_is_the_files(packed: Path, asked: str, fits: bool) -> None:
    """Asking for it changes nothing, asking for another is refused."""
    if fits:
        model = MetaModel.from_pretrained(packed, quant=True, quant_type=asked)
        assert model.llma.layers[0].attention.wq.weight.nested
        return
    with pytest.raises(ConfigError, match=rf"--quant_type {asked}: {packed} is packed as nf4 already"):
        MetaModel.from_pretrained(packed, quant=True, quant_type=asked)


def with_meta(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A change of the packed matrices in meta.json."""

    def damage(path: Path) -> None:
        meta = json.loads((path / "meta.json").read_text())
        change(meta)
        (path / "meta.json").write_text(json.dumps(meta))

    return damage


def with_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    """A change of the tensors."""

    def damage(path: Path) -> None:
        stored = load_file(path / "model.safetensors")
        change(stored)
        save_file(stored, path / "model.safetensors")

    return damage


SAYS = rf"meta.json: says .* of {NAME}; expected quant_type and shape"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (with_meta(lambda meta: meta.update(packed=["w2"])), r"meta.json: 'packed' is \['w2'\]; expected an object"),
        (with_meta(lambda meta: meta["packed"][NAME].update(quant_type="int4")), SAYS),
        (with_meta(lambda meta: meta["packed"][NAME].update(shape=[128])), SAYS),
        (with_meta(lambda meta: meta["packed"][NAME].pop("shape")), SAYS),
        (with_meta(lambda meta: meta["packed"].update({NAME: None})), SAYS),
        (with_meta(lambda meta: meta["packed"][NAME].update(shape=[128, 999])), r"\(128, 999\) has 16384 codes"),
        (with_meta(lambda meta: meta["packed"][NAME].update(shape=[256, 128])), r"w2.weight has shape \(256, 128\)"),
        (with_meta(lambda meta: meta["packed"].pop(NAME)), "w2.weight.codes.* no place in this model"),
        (with_tensors(lambda stored: stored.pop(f"{NAME}.codes")), f"{NAME} is packed, but its codes is missing"),
        (with_tensors(lambda stored: stored.pop(f"{NAME}.scales")), f"{NAME} is packed, but its scales is missing"),
        (with_tensors(lambda stored: stored.pop(f"{NAME}.nested_scales")), "but its nested_scales is missing"),
        (with_tensors(lambda stored: stored.pop(f"{NAME}.offset")), "but its offset is missing"),
        (
            with_tensors(lambda stored: stored.update({f"{NAME}.codes": stored[f"{NAME}.codes"][:-8].clone()})),
            "has 16376 codes; expected 16384",
        ),
        (
            with_tensors(lambda stored: stored.update({f"{NAME}.scales": stored[f"{NAME}.scales"][1:].clone()})),
            "has 511 scales; expected 512",
        ),
    ],
)
def test_damage_is_named(packed: Path, copy, damage: Callable[[Path], None], message: str) -> None:
    """Each part that is missing or strange, before any weight is read."""
    path = copy(packed)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        MetaModel.from_pretrained(path)


def flags(base: Path, output: Path, **more: object) -> FinetuneConfig:
    """One step of NormBias on the example data."""
    return FinetuneConfig(
        pretrained_path=[base], data_config=DATA, output_dir=output, llama_type="llama_peft", device="cpu",
        max_words=160, batch_size=2, accum_iter=1, max_steps=1, num_workers=0, **more,
    )  # fmt: skip


def test_training_needs_no_flag(packed: Path, tmp_path: Path, tiny_base: Path) -> None:
    """The trained part knows the base and its storage, and is asked upon it; packing at load trains the same."""
    finetune(flags(packed, tmp_path / "out", only_save_trainable=True))
    part = tmp_path / "out" / "epoch0-iter1"
    run = json.loads((part / "run.json").read_text())
    assert run["quantization"] == "nf4" and run["base"][0]["path"] == str(packed)
    assert MetaModel.from_pretrained(part).llma.layers[0].attention.wq.weight.quant_type == "nf4"
    finetune(flags(tiny_base, tmp_path / "anew", only_save_trainable=True, quant=True))
    first, second = (load_file(tmp_path / name / "epoch0-iter1" / "trainable.safetensors") for name in ("out", "anew"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_never_writes_the_base(packed: Path, tmp_path: Path) -> None:
    """Without --only_save_trainable it would have to; full training cannot begin."""
    with pytest.raises(ConfigError, match=r"The base is packed as nf4.*give --only_save_trainable"):
        finetune(flags(packed, tmp_path / "out"))
    full = flags(packed, tmp_path / "out", only_save_trainable=True).model_copy(update={"llama_type": "llama"})
    with pytest.raises(ConfigError, match=r"nf4 weights cannot be trained; use --llama_type llama_peft"):
        finetune(full)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {STATUS_FILE}
