"""A side network on disk: in our form and in the published one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from accessory.errors import CheckpointError, ConfigError
from accessory.meta import MetaModel
from tests.hugging_face.loaded_models import CLASSES, TOKENS, moved


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
def test_saved_it_gives_the_same_logits(made, bases, family: str, tmp_path: Path) -> None:
    """In Python and, behind its base, in every command of ours."""
    model = moved(made(family, start="released")[0])
    wanted = model(TOKENS[None]).logits[0]
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):  # the second replaces the first
        model.save_qst_state(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    again, _ = made(family, start="released")
    again.load_qst_state(str(tmp_path))
    assert torch.equal(again(TOKENS[None]).logits[0], wanted)
    asked = MetaModel.from_pretrained([bases[family], tmp_path], dtype="fp32", quant=True)
    assert torch.equal(asked.logits(TOKENS, (40,)), wanted)
    with pytest.raises(ConfigError, match=r"was trained with .*start 'released', here it is 'base'"):
        made(family)[0].load_qst_state(tmp_path)
    (tmp_path / "config.json").unlink()
    for settings, fault in (
        ({"r": 8}, r"side\.0\.attention\.wq\.weight has shape \(32, 32\), expected \(16, 16\).* and \d+ more"),
        ({"embedding_downsample": "own"}, r"embedding_downsample\.a\.weight is missing"),
        ({"side_layers": 2}, r"gates\.1\.weight has no place"),
    ):
        with pytest.raises(CheckpointError, match=rf"does not fit this side network: .*{fault}"):
            made(family, start="released", **settings)[0].load_qst_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json: belongs to a transformers model"):
        model.save_qst_state(bases[family])


@pytest.mark.parametrize("family", CLASSES)
def test_published_files(made, family: str, tmp_path: Path) -> None:
    """Written and read; its frozen norms and OPT's other gate among them."""
    model = moved(made(family, start="released")[0])
    model.save_qst_state(tmp_path / "side", released=True)
    gate = {"llama": "lm_head_z_path.pt", "opt": "lm_head_z_parameters.pt"}[family]
    parts = ("layers", "z", "downsample", "norm", "upsample")
    assert {file.name for file in (tmp_path / "side").iterdir()} == {gate, *(f"qst_{p}_parameters.pt" for p in parts)}
    again, _ = made(family, start="released")
    again.load_qst_state(tmp_path / "side")
    assert torch.equal(again(TOKENS[None]).logits, model(TOKENS[None]).logits)
    with pytest.raises(CheckpointError, match=r"cannot express start 'base' \(only 'released'\)"):
        made(family)[0].save_qst_state(tmp_path / "other", released=True)
