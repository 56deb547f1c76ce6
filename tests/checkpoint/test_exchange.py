"""Trained parts exchanged beside a base that stays in memory: each gives what it gives when it is loaded afresh."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accessory.checkpoint import load
from accessory.checkpoint.opening import open_source
from accessory.errors import AccessoryError, CheckpointError, ConfigError
from accessory.meta import MetaModel
from accessory.parallel import groups
from tests.checkpoint.trained import write_trained, write_trained_side
from tests.conftest import TINY_CONFIG, write_model, write_tokenizer

IDS = torch.arange(30) * 7 % 500
LORA = {"norm_tuning": False, "bias_tuning": False}


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


@pytest.fixture(scope="module")
def parts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained beside the tiny base in 4 bits: side networks of two shapes, LoRA alone and with norms and biases."""
    home = tmp_path_factory.mktemp("parts")
    return {
        "side": write_trained_side(tiny_base, home / "side", "nf4", r=4),
        "other side": write_trained_side(tiny_base, home / "other", "nf4", r=2, downsample="avgpool", tail=1),
        "LoRA": write_trained(tiny_base, home / "lora", "nf4", **LORA),
        "norms and all": write_trained(tiny_base, home / "norms", "nf4"),
    }


def logits(model: MetaModel) -> torch.Tensor:
    """Of one document."""
    return model.logits(IDS, (len(IDS),))


@pytest.mark.parametrize("quant", [True, False])
def test_each_part_gives_what_it_gives_alone(
    tiny_base: Path, parts: dict[str, Path], quant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, in any order; of the base only what a part before it had replaced is read again."""
    wanted = {name: logits(MetaModel.from_pretrained([tiny_base, part], quant=quant)) for name, part in parts.items()}
    plain = MetaModel.from_pretrained(tiny_base, quant=quant)
    wanted[None], of_base = logits(plain), {target.name for target in load.targets(plain.llma)}
    model = MetaModel.from_pretrained([tiny_base, parts["side"]], quant=quant)
    matrix = model.llma.layers[0].attention.wq.weight
    read: list[str] = []
    fill_one = load._fill_one
    monkeypatch.setattr(load, "_fill_one", lambda target, *rest: read.append(target.name) or fill_one(target, *rest))
    before: set[str] = set()  # what the part in use has
    for name in ("other side", "LoRA", None, "norms and all", "side", "norms and all", None, "side"):
        read.clear()
        model.use(parts[name] if name else None)
        assert torch.equal(logits(model), wanted[name]), name
        held = set(load_file(parts[name] / "trainable.safetensors")) if name else set()
        assert set(read) == held | (before & of_base), name
        before = held
    assert model.llma.layers[0].attention.wq.weight is matrix
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_answers_are_those_of_the_part_in_use(tiny_base: Path, parts: dict[str, Path]) -> None:
    """With a cache for its own side network, in a batch, streamed, and after an answer of another part."""
    prompts, wanted = ["What is QST?", "x"], {}
    for name, part in parts.items():
        wanted[name] = MetaModel.from_pretrained(part).generate(prompts, max_gen_len=6)
    model = MetaModel.from_pretrained(parts["side"])
    for name in ("LoRA", "other side", "side", "norms and all", "other side"):
        model.use(parts[name])
        assert model.generate(prompts, max_gen_len=6) == wanted[name]
        assert list(model.stream_generate(prompts[0], max_gen_len=6))[-1] == wanted[name][0]


def test_what_does_not_belong_leaves_the_model_as_it_was(
    tiny_base: Path, parts: dict[str, Path], tmp_path: Path
) -> None:
    """Each refusal names what was found, and what is loaded."""
    other = tmp_path / "another"
    other.mkdir()
    write_model(other, TINY_CONFIG | {"num_hidden_layers": 3})
    write_tokenizer(other)
    model = MetaModel.from_pretrained(parts["side"])
    before = logits(model)
    damaged = shutil.copytree(parts["LoRA"], tmp_path / "damaged")
    tensors = load_file(damaged / "trainable.safetensors")
    save_file(dict(list(tensors.items())[1:]), damaged / "trainable.safetensors")
    for part, kind, said in [
        (write_trained(other, tmp_path / "foreign", "nf4"), CheckpointError,
         rf"foreign: was trained on .*another with fingerprint \w+; loaded is {tiny_base} with \w+"),
        (tiny_base, CheckpointError, f"is a whole model, no part trained beside {tiny_base}"),
        (write_trained(tiny_base, tmp_path / "plain", None), ConfigError,
         "plain: was trained beside a plain base; loaded is a base packed as nf4. .* state quant"),
        (damaged, CheckpointError, "is missing"), (tmp_path / "absent", CheckpointError, "no such checkpoint"),
        ("", ConfigError, "use.. was given ''; expected a trained part"), (3, ConfigError, "a path is 3"),
    ]:  # fmt: skip
        with pytest.raises(kind, match=said):
            model.use(part)
        assert torch.equal(logits(model), before)
    with pytest.raises(ConfigError, match=r"model that MetaModel\.from_pretrained has loaded"):
        MetaModel(model.llma, model.tokenizer, 64).use(parts["side"])
    assert issubclass(CheckpointError, AccessoryError)


def test_a_part_with_its_own_tokenizer_and_layout(tiny_base: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    """They are exchanged with it, the chat template too, and come back."""
    part = shutil.copytree(parts["LoRA"], tmp_path / "chatty")
    stated = json.loads((part / "tokenizer_config.json").read_text()) | {"chat_template": "{{ messages }}"}
    (part / "tokenizer_config.json").write_text(json.dumps(stated))
    run = json.loads((part / "run.json").read_text()) | {"prompt_layouts": {"none": 4}}
    (part / "run.json").write_text(json.dumps(run))
    model = MetaModel.from_pretrained(parts["side"])
    tokenizer = model.tokenizer
    model.use(parts["LoRA"])
    assert model.prompt_layouts == () and model.tokenizer is tokenizer  # the same: not read again, which takes time
    model.use(part)
    assert model.tokenizer.chat_template == "{{ messages }}" and model.prompt_layouts == ("none",)
    assert model.chat is model.chat
    model.use(parts["side"])
    assert model.tokenizer.chat_template is None and "chat" not in model.__dict__


def test_a_part_that_went_on_from_another(tiny_base: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    """The one before it, which run.json names, is opened with it."""
    part = shutil.copytree(parts["LoRA"], tmp_path / "later")
    tensors = load_file(part / "trainable.safetensors")
    run, first = json.loads((part / "run.json").read_text()), parts["norms and all"]
    run["base"].append({"path": str(first), "format": "x", "fingerprint": open_source(first).fingerprint()})
    (part / "run.json").write_text(json.dumps(run))
    shutil.copy(first / "config.json", part)
    save_file({name: -value for name, value in tensors.items()}, part / "trainable.safetensors")
    wanted = logits(MetaModel.from_pretrained(part))
    model = MetaModel.from_pretrained(parts["side"])
    model.use(part)
    assert torch.equal(logits(model), wanted)


def test_two_ranks(tiny_base: Path, parts: dict[str, Path], tmp_path: Path, torchrun) -> None:
    """Computed in exchange_worker.py."""
    side = write_trained_side(tiny_base, tmp_path / "side", r=2, side_heads=2, tail=1)
    other = write_trained_side(tiny_base, tmp_path / "other", r=4, side_heads=4)
    done = torchrun(2, Path(__file__).with_name("exchange_worker.py"), tiny_base, side, other, parts["norms and all"])
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):  # their lines may run into each other
        assert done.stdout.count(f"rank {rank} refused") == 1
