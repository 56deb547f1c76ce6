"""A state of another run is refused, field by field, but for what may differ."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from accessory.checkpoint.training_state import (
    find_resumption,
)
from accessory.errors import CheckpointError
from accessory.parallel.groups import Layout
from tests.checkpoint.training_state.states import (
    IDENTITY,
    OTHER,
    conditions,
    load,
)


@pytest.mark.parametrize("field", [field for field in IDENTITY if field not in ("settings", "data")])
def test_another_run_is_refused(trained, tmp_path: Path, field: str) -> None:
    """Field by field, with both values."""
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, *trained, **{field: OTHER[field]})
    fixed = field in ("llama_type", "settings", "optim")  # nothing would fit
    hint = "" if fixed else f" To go on all the same: --allow_changed {field}."
    assert str(caught.value) == (
        f"{tmp_path}: belongs to another run: {field} was {IDENTITY[field]!r}, is {OTHER[field]!r}.{hint}"
    )


def test_of_many_values_those_that_differ_are_named(trained, tmp_path: Path) -> None:
    """By the user's own names, not as two digests or two long lists."""
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, *trained, settings=OTHER["settings"], data=OTHER["data"])
    assert str(caught.value) == (
        f"{tmp_path}: belongs to another run: settings.lora_rank was 4, is 8; data.max_words was 1024, is 512; "
        "data.META[0].prompt_type was 'alpaca', is 'none'."
    )
    with pytest.raises(CheckpointError, match=r"data\.META was \[.*'ab'.*\], is \[\]\. To go on all the same"):
        load(tmp_path, *trained, data={"max_words": 1024, "META": []})


def test_data_that_an_earlier_version_knew_by_a_digest_are_another(trained, tmp_path: Path) -> None:
    record = tmp_path / "training_state.json"
    saved = json.loads(record.read_text())
    saved["identity"]["data"] = "ab12"
    record.write_text(json.dumps(saved))
    said = "recorded by an earlier version, which does not tell what in it differs now"
    words = rf"data was 'ab12', {said}\. To go on .*--allow_changed data"
    with pytest.raises(CheckpointError, match=words):
        load(tmp_path, *trained)
    assert load(tmp_path, *trained, allowed=("data",)).changed == ("data",)


def test_what_an_earlier_version_did_without_a_flag(trained, tmp_path: Path) -> None:
    """Its runs go on: they had a cosine and a second beta of 0.95."""
    record = tmp_path / "training_state.json"
    saved = json.loads(record.read_text())
    del saved["identity"]["lr_schedule"], saved["identity"]["adam_beta2"]
    record.write_text(json.dumps(saved))
    assert load(tmp_path, *trained).changed == ()
    with pytest.raises(CheckpointError, match=r"adam_beta2 was 0\.95, is 0\.999\. .*--allow_changed adam_beta2"):
        load(tmp_path, *trained, adam_beta2=0.999)


def test_what_followed_from_the_base_was_recorded_as_null(trained, tmp_path: Path) -> None:
    """It is a number now, so that the run goes on whatever follows from the base in this version."""
    record = tmp_path / "training_state.json"
    saved = json.loads(record.read_text())
    saved["identity"]["settings"] |= {"tail": None, "side_heads": None}
    record.write_text(json.dumps(saved))
    now = IDENTITY["settings"] | {"tail": 1, "side_heads": None}
    assert load(tmp_path, *trained, settings=now).changed == ()
    saved["identity"]["settings"]["tail"] = 2
    record.write_text(json.dumps(saved))
    with pytest.raises(CheckpointError, match=r"settings\.tail was 2, is 1"):
        load(tmp_path, *trained, settings=now)


def test_all_differences_are_named(trained, tmp_path: Path) -> None:
    """At once."""
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, *trained, **OTHER)
    assert all(re.search(rf"\b{field}\S* was", str(caught.value)) for field in IDENTITY)


def test_what_is_allowed_may_differ_and_is_told(trained, tmp_path: Path) -> None:
    found = load(tmp_path, *trained, allowed=("seed", "data"), seed=1, data=OTHER["data"])
    assert found.changed == ("seed", "data") and not found.inexact
    with pytest.raises(
        CheckpointError, match=r"run: global_batch was 16, is 8\. .*--allow_changed seed global_batch\."
    ):
        load(tmp_path, *trained, allowed=("seed",), seed=1, global_batch=8)
    with pytest.raises(CheckpointError, match=r"seed was .*; data.max_words was .*--allow_changed seed data\.$"):
        load(tmp_path, *trained, seed=1, data=OTHER["data"])
    with pytest.raises(CheckpointError, match=r"lora_rank.*\.$") as refused:
        load(tmp_path, *trained, settings={"lora_rank": 8})
    assert "--allow_changed" not in str(refused.value)


def test_what_follows_from_a_change_need_not_be_allowed(trained, tmp_path: Path) -> None:
    now, how = IDENTITY | {"seed": 1, "global_batch": 8}, (conditions(Layout()),)
    with pytest.raises(CheckpointError, match=r"seed was .*; global_batch was 16, .*: --allow_changed seed\.$"):
        find_resumption(tmp_path, now, *how, follows={"global_batch": "seed"})
    found = find_resumption(tmp_path, now, *how, ("seed",), {"global_batch": "seed"})
    assert found.changed == ("seed", "global_batch")
