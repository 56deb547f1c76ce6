"""GreenBit's files: what is missing or strange in them, and a strategy that does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError
from tests.checkpoint.formats.low_bit_models import V, changed


@pytest.mark.parametrize(
    ("name", "change", "stated", "message"),
    [
        ("greenbit", lambda t: t.pop(f"{V}.q_perm"), {}, f"{V}.q_perm is missing"),
        ("greenbit", lambda t: t[f"{V}.q_perm"][:2].fill_(3), {}, f"{V}.q_perm names a channel twice"),
        (
            "greenbit",
            lambda t: t.update({f"{V}.zeros": t[f"{V}.scales"].repeat(2, 1)}),
            {},
            f"{V}.zeros and scales have",
        ),
        ("greenbit-channel-mix", lambda t: t[f"{V}.q_groups"][:1].fill_(8), {}, f"{V}.qweight holds numbers of 8 bits"),
        (
            "greenbit-channel-mix",
            lambda t: t.update({f"{V}.q_groups": t[f"{V}.q_groups"][:-1].clone()}),
            {},
            f"{V}.q_groups has 5 numbers; expected bits and first row of each of 3 groups",
        ),
        (
            "greenbit-two-levels",
            lambda t: t.update({f"{V}.qzeros_scales": t[f"{V}.qzeros_scales"][:3].clone()}),
            {},
            rf"{V}.qzeros_scales has shape \[3, 2, 1\]; expected \[4, 2, 1\]",
        ),
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
