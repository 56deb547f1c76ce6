"""Flags that cannot work are said to be wrong before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.errors import CheckpointError, ConfigError
from accessory.export import (
    Destination,
    convert,
)
from tests.export.models import TOLERANCE, apart, ours, theirs


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"to": "ggfu"}, "--to 'ggfu' is unknown. Did you mean 'gguf'.* hf, gptq, awq, greenbit, g"),
        ({"dtype": "fp23"}, r"--dtype 'fp23' is unknown. Did you mean 'fp.*'\? Known: bf16, fp16, fp32"),
        ({"to": "meta", "ranks": 0}, "--model_parallel_size 0 is not a number of shards"),
        ({"to": "meta", "ranks": "two"}, "--model_parallel_size 'two' is not a number of shards"),
        ({"to": "gguf", "quant_type": "nf4"}, "--to gguf: packed weights are written as accessory, hf, gptq,"),
    ],
)
def test_unknown(flags: dict, message: str) -> None:
    """The nearest is named."""
    with pytest.raises(ConfigError, match=message):
        Destination(**flags)


def test_gguf_is_told_by_its_name(tiny_base: Path, tmp_path: Path) -> None:
    """What could not be opened again is not written."""
    with pytest.raises(ConfigError, match=rf"{tmp_path}/model: .* one that ends in .gguf"):
        convert([tiny_base], tmp_path / "model", Destination("gguf"))
    assert not list(tmp_path.iterdir())


def test_architecture(tiny_base: Path, tmp_path: Path) -> None:
    """Another model type, where it can express the model; the nearest to one that is unknown."""
    with pytest.raises(CheckpointError, match=r"--architecture: .*'lama' is not supported. Did you mean 'llama'"):
        convert([tiny_base], tmp_path / "out", Destination("hf", architecture="lama"))
    with pytest.raises(CheckpointError, match=r"A bloom config.json cannot express this model's .*position"):
        convert([tiny_base], tmp_path / "out", Destination("hf", architecture="bloom"))
    convert([tiny_base], tmp_path / "mistral", Destination("hf", "fp32", architecture="mistral"))
    assert apart(theirs(tmp_path / "mistral"), ours(tiny_base)) < TOLERANCE


@pytest.mark.parametrize("to", ["accessory", "hf", "gguf", "meta", "upstream"])
def test_what_is_there_stays(tiny_base: Path, to: str, tmp_path: Path) -> None:
    """Whatever the format."""
    target = tmp_path / f"out.{to}"
    if to == "gguf":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "precious").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"{target}: found"):
        convert([tiny_base], target, Destination(to))
    assert sorted(tmp_path.rglob("*")) == before
