"""How values of flags may be written: layers, sizes, names of optimizers and trackers."""

from __future__ import annotations

import importlib.util

import pytest

from accessory.config import FinetuneConfig, parse, plain
from tests.config.refusal import refusal


@pytest.mark.parametrize(
    ("words", "value"),
    [([], "none"), (["none"], "none"), (["all"], "all"), (["auto"], "auto"), (["0"], 0), (["12"], 12)],
)
def test_checkpointing(paths: list[str], words: list[str], value: str | int) -> None:
    """None, all, as many as fit, or a number; a bare one is upstream's switch, wherever it stands."""
    assert parse(FinetuneConfig, [*paths, *(["--checkpointing"] if words else []), *words]).checkpointing == value
    assert parse(FinetuneConfig, [*paths, "--checkpointing", "--no_visual"]).checkpointing == "all"
    assert parse(FinetuneConfig, ["--quant", "--only_save_trainable", *paths, "--checkpointing"]).checkpointing == "all"


@pytest.mark.parametrize("value", ["some", "-1", "1.5", "al"])
def test_checkpointing_that_cannot_be(paths: list[str], value: str) -> None:
    """Said in one line, with what can."""
    assert refusal([*paths, f"--checkpointing={value}"]) == [
        f"--checkpointing is '{value}': Input should be 'none', 'all', 'auto' or a number of layers."
    ]


def test_checkpointing_as_it_was_recorded(paths: list[str]) -> None:
    """run.json of an earlier version has a switch's values; True must not be taken for one layer."""
    values = plain(parse(FinetuneConfig, paths))
    found = [FinetuneConfig(**values | {"checkpointing": value}).checkpointing for value in (True, False, 1, "all")]
    assert found == ["all", "none", 1, "all"]
    assert [type(value) for value in found] == [str, str, int, str]


@pytest.mark.parametrize(
    ("stated", "size"),
    [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("80000MB", 8e10), ("1.5", 1.5e9), ("512mib", 2**29)],
)
def test_max_memory(paths: list[str], stated: str, size: float) -> None:
    """In bytes; as it was written in run.json."""
    config = parse(FinetuneConfig, [*paths, "--max_memory", stated])
    assert config.max_memory_bytes == FinetuneConfig(**plain(config)).max_memory_bytes == size
    assert parse(FinetuneConfig, paths).max_memory_bytes is None


@pytest.mark.parametrize(("given", "optim"), [
    ("paged_adamw_32bit", "paged_adamw"), ("paged_adamw", "paged_adamw"),
    ("adamw_torch", "adamw"), ("adamw_torch_fused", "adamw"), ("adamw_apex_fused", "adamw"), ("adamw_hf", "adamw"),
    ("adamw_bnb_8bit", "adamw8bit"), ("adamw_8bit", "adamw8bit"), ("adamw8bit", "adamw8bit"),
])  # fmt: skip
def test_optimizers_by_the_names_of_transformers(paths: list[str], given: str, optim: str) -> None:
    assert parse(FinetuneConfig, [*paths, "--optim", given]).optim == optim
    (said,) = refusal([*paths, "--optim", "paged_adamw_8bit"])
    assert said == (
        "--optim is 'paged_adamw_8bit': moments in 8 bits are not paged here: give adamw8bit, or paged_adamw."
    )
    for theirs in ("adafactor", "lion_32bit", "sgd"):
        (said,) = refusal([*paths, "--optim", theirs])
        assert said == f"--optim is '{theirs}': Input should be 'adamw', 'adamw8bit' or 'paged_adamw'."


def test_trackers_are_words_or_one_with_commas(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose package is missing names the line that installs it."""
    assert parse(FinetuneConfig, paths).report_to == ["tensorboard"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    both = ["--report_to", "tensorboard,wandb"]
    assert "--report_to wandb: wandb is not installed. Install it with: pip install -e '.[wandb]'" in refusal(
        [*paths, *both]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert parse(FinetuneConfig, [*paths, *both]).report_to == ["tensorboard", "wandb"]
    assert parse(FinetuneConfig, [*paths, "--report_to", "wandb", "tensorboard"]).report_to == ["wandb", "tensorboard"]
