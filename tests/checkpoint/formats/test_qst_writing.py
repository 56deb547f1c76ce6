"""Side networks of ours written as the published QST code has them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.errors import CheckpointError
from accessory.export import export_side
from tests.checkpoint.formats.published_side import (
    BOTTLENECK,
    FINAL_GATE,
    WIDTH,
    R,
    family_of,
    ours,
    published,
)
from tests.checkpoint.trained import write_trained_side


def test_round_trip(base: Path, tmp_path: Path) -> None:
    """Ours written as theirs: the same files, from which the same logits come, and again the same files."""
    settings = {"r": R, "peft_hidden_size": BOTTLENECK, "start": "released", "add_layer_norm_before_adapter": True}
    trained = write_trained_side(base, tmp_path / "trained", **settings)
    said = export_side([base, trained], tmp_path / "written")
    assert f"QSTConfig(r={R}, alpha_r={R}, peft_hidden_size={BOTTLENECK}, activation='swish', " in said
    wanted = published(base, tmp_path / "like", torch.ones(WIDTH), before=True)
    assert {f.name for f in (tmp_path / "written").iterdir()} == {f.name for f in wanted.iterdir()}
    for file in wanted.iterdir():
        theirs, mine = (torch.load(folder / file.name, weights_only=True) for folder in (wanted, tmp_path / "written"))
        if file.name == FINAL_GATE[family_of(base)]:
            assert mine.shape == theirs.shape
        else:
            shapes = [{name: tensor.shape for name, tensor in state.items()} for state in (mine, theirs)]
            assert shapes[0] == shapes[1]
    assert torch.equal(ours(base, tmp_path / "written"), ours(base, trained))
    export_side([base, tmp_path / "written"], tmp_path / "again")
    for file in (tmp_path / "written").iterdir():
        first, second = (torch.load(folder / file.name, weights_only=True)
                         for folder in (tmp_path / "written", tmp_path / "again"))  # fmt: skip
        pairs = [(first, second)] if isinstance(first, Tensor) else [(first[name], second[name]) for name in first]
        assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "start 'base' (only 'released')"),
        ({"tail": 1, "gate": "scalar"}, "start 'base' (only 'released'); gate 'scalar' (only 'vector'); tail 1 "),
        ({"start": "released", "downsample": "lora"}, "downsample 'lora' (only 'adapter')"),
        ({"start": "released", "side_layers": 3}, "side_layers 3 (only 1)"),
        ({"start": "released", "embedding_downsample": "own"}, "embedding_downsample 'own' (only 'shared')"),
        ({"start": "released", "side_heads": 2}, "side_heads 2 (only the base's 4, "),
    ],
    ids=str,
)
def test_what_the_published_form_lacks(settings: dict, said: str, base: Path, tmp_path: Path) -> None:
    """Every setting that it cannot express is named, and nothing is written."""
    trained = write_trained_side(base, tmp_path / "trained", r=R, **settings)
    with pytest.raises(CheckpointError) as raised:
        export_side([base, trained], tmp_path / "written")
    assert f"{trained}: the published QST code cannot express " in str(raised.value) and said in str(raised.value)
    assert not (tmp_path / "written").exists()


def test_only_side_networks_are_written(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is a {family_of(base)}; --to qst writes a side network"):
        export_side([base], tmp_path / "written")
