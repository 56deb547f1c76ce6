"""run.json: a trained part finds the base it was trained on, and says so when it cannot."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from accessory.checkpoint.opening import open_source
from accessory.checkpoint.run_record import run_record, trained_prompt_layouts, trained_system, with_base
from accessory.errors import CheckpointError


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the base that a test may move."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


@pytest.fixture
def part(base: Path, tmp_path: Path) -> Path:
    """A part trained on it."""
    directory = tmp_path / "epoch0"
    directory.mkdir()
    save_file({"norm.weight": torch.ones(128)}, directory / "trainable.safetensors")
    record = run_record({"lr": 0.1}, [open_source(base)], "nf4", "ab12")
    (directory / "run.json").write_text(json.dumps(record))
    return directory


def refusal(*paths: Path) -> str:
    """What `with_base` says against `paths`."""
    with pytest.raises(CheckpointError) as caught:
        with_base(list(paths))
    return str(caught.value)


def test_record_holds_what_a_later_command_needs(base: Path, part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, the base's absolute path and fingerprint, quantization, data, versions."""
    monkeypatch.chdir(base.parent)
    record = run_record({"lr": 0.1}, [open_source("base")], "nf4", "ab12")
    expected = {"path": str(base), "format": "Hugging Face", "fingerprint": open_source(base).fingerprint()}
    assert record["base"] == [expected]
    assert (record["arguments"], record["quantization"], record["data_fingerprint"]) == ({"lr": 0.1}, "nf4", "ab12")
    assert record["versions"] == {name: version(name) for name in ("torch", "bitsandbytes", "safetensors")}
    assert record["started"][:2] == "20"


def test_base_is_found(base: Path, part: Path) -> None:
    """Alone, the part brings its base; with the base given, nothing is added."""
    assert [source.path for source in with_base([part])] == [base, part]
    assert [source.path for source in with_base([base, part])] == [base, part]
    assert [source.path for source in with_base([str(base)])] == [base]


def test_base_behind_its_part(base: Path, part: Path) -> None:
    """It would replace all that was trained, silently."""
    message = refusal(part, base)
    assert message.startswith(f"{base}: is a whole model and would replace the trained part {part} in front of it")
    assert "--pretrained_path BASE TRAINABLE" in message


def test_where_a_run_writes(part: Path) -> None:
    """The directory above the checkpoints, which --output_dir named."""
    (part / "manifest.json").write_text("{}")
    assert refusal(part.parent) == (
        f"{part.parent}: is the output directory of a run; give a checkpoint in it: epoch0."
    )


@pytest.mark.parametrize("name", ["trainable.safetensors", "run.json"])
def test_a_file_of_a_checkpoint(part: Path, name: str) -> None:
    assert "If it is part of a checkpoint, give the directory." in refusal(part / name)


def test_chain_of_parts(base: Path, part: Path, tmp_path: Path) -> None:
    """A part trained on a base and a first part brings both, in order."""
    second = tmp_path / "epoch1"
    shutil.copytree(part, second)
    record = run_record({}, [open_source(base), open_source(part)], None, "")
    (second / "run.json").write_text(json.dumps(record))
    assert [source.path for source in with_base([second])] == [base, part, second]
    assert [source.path for source in with_base([base, part, second])] == [base, part, second]


def test_a_part_that_leaves_nothing_of_another(base: Path, part: Path, tmp_path: Path) -> None:
    """Trained on the base alone, it would replace the other silently, where peft's users expect the sum."""
    other = Path(shutil.copytree(part, tmp_path / "other"))
    save_file({"norm.weight": torch.zeros(128)}, other / "trainable.safetensors")
    said = f"{other}: would replace every value of the part {part}, on which it was not trained"
    assert refusal(base, part, other).startswith(said)
    assert refusal(part, other).startswith(said)
    (other / "run.json").unlink()
    assert f"leave {part} out" in refusal(base, part, other)
    save_file({"layers.0.attention_norm.weight": torch.zeros(128)}, other / "trainable.safetensors")
    assert [source.path for source in with_base([base, part, other])] == [base, part, other]


def test_base_moved(base: Path, part: Path, tmp_path: Path) -> None:
    """The message says where it was and how to give its new place, which then works."""
    moved = base.rename(tmp_path / "moved")
    message = refusal(part)
    assert message.startswith(f"{part}: was trained on the base {base}, which is not there.")
    assert "--pretrained_path BASE TRAINABLE" in message
    assert [source.path for source in with_base([moved, part])] == [moved, part]


def test_base_changed(base: Path, part: Path) -> None:
    """Other weights at the same place: both fingerprints are shown."""
    before = open_source(base).fingerprint()
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (base / "model.safetensors").write_bytes(content)
    message = refusal(part)
    after = open_source(base).fingerprint()
    assert (
        f"{part}: was trained on {base} with fingerprint {before[:12]}, but what lies there now has {after[:12]}"
        in (message)
    )
    assert [source.path for source in with_base([base, part])] == [base, part]


def test_base_is_unknown(part: Path) -> None:
    """A trained part without run.json."""
    (part / "run.json").unlink()
    message = refusal(part)
    assert message.startswith(f"{part}: holds only a trained part and no run.json that names its base")
    assert "--pretrained_path BASE TRAINABLE" in message


@pytest.mark.parametrize(("recorded", "layouts"), [
    ({"prompt_layouts": {"none": 7, "alpaca": 2}}, ("none", "alpaca")), ({}, ()),
])  # fmt: skip
def test_layouts_of_what_was_trained(part: Path, recorded: dict, layouts: tuple[str, ...]) -> None:
    """Of a part from before they were recorded, none is known."""
    record = json.loads((part / "run.json").read_text())
    del record["prompt_layouts"]
    (part / "run.json").write_text(json.dumps(record | recorded))
    assert trained_prompt_layouts(with_base([part])) == layouts


@pytest.mark.parametrize("layouts", ["alpaca", [["none"]], {"alpacca": 3}, None])
def test_wrong_layouts(part: Path, layouts: object) -> None:
    record = json.loads((part / "run.json").read_text())
    (part / "run.json").write_text(json.dumps(record | {"prompt_layouts": layouts}))
    assert f"{part / 'run.json'}: 'prompt_layouts' is {layouts!r}; expected those of alpaca, " in refusal(part)


def test_the_systems_words(part: Path) -> None:
    """They belong to the last part; what is no text is refused."""
    record = json.loads((part / "run.json").read_text())
    assert record["system"] is None and trained_system(with_base([part])) is None
    (part / "run.json").write_text(json.dumps(record | {"system": "Be brief."}))
    assert trained_system(with_base([part])) == "Be brief."
    (part / "run.json").write_text(json.dumps(record | {"system": 3}))
    assert f"{part / 'run.json'}: 'system' is 3; expected a text, or null." in refusal(part)


def test_record_is_damaged(part: Path) -> None:
    """Not JSON."""
    (part / "run.json").write_text('{"base": ')
    assert f"{part / 'run.json'}: found a JSON-like text" in refusal(part)
