"""accessory/quantizer/own_text.py against drawing from logits that are computed anew for each token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from accessory.export import open_base
from accessory.meta import MetaModel
from accessory.parallel import groups
from accessory.quantizer import own_text
from accessory.quantizer.folder import Folder


def test_is_drawn_from_the_model(tiny_base: Path, tmp_path: Path, monkeypatch) -> None:
    """Each token by its probability after those before it; what is in the folder is not drawn again."""
    monkeypatch.setattr(own_text, "TOGETHER", 3)
    model, _ = open_base([tiny_base])
    layout, lines = groups.start("cpu"), []
    folder = Folder(tmp_path, 0, groups.data_parallel_group())

    def rows(model) -> torch.Tensor:
        return own_text.own_rows(model, 5, 12, 7, folder, dtype=torch.float32, layout=layout, say=lines.append)

    found = rows(model)
    asked = MetaModel.from_pretrained(tiny_base, dtype="fp32")
    start = [*model.tokenizer.start_ids] or [model.tokenizer.bos_id]
    expected = []
    for number, count in enumerate((3, 2)):
        generator, ids = torch.Generator().manual_seed(7 * 10007 + number), torch.tensor([start] * count)
        while ids.shape[1] < 12:
            logits = asked.logits(ids.flatten(), (ids.shape[1],) * count).view(count, ids.shape[1], -1)[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.float().softmax(1), 1, generator=generator)], 1)
        expected.append(ids)
    assert found.dtype == torch.int64 and torch.equal(found, torch.cat(expected))
    assert lines == ["own text: 3/5 rows", "own text: 5/5 rows"]
    assert torch.equal(rows(replace(model, tensors={})), found)
