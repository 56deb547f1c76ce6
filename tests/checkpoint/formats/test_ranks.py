"""Two ranks hold slices of what lies packed, in whichever format: no matrix is packed anew."""

from __future__ import annotations

from pathlib import Path

import torch

from accessory.export import Destination, open_base
from tests.checkpoint.formats.low_bit_models import WRITERS, logits

PACKED_BY_US = (
    ("accessory", "nf4"), ("accessory", "fp4_single"), ("accessory", "int8"), ("accessory", "int3_g128"),
    ("hf", "nf4"), ("hf", "nf4_single"),
)  # fmt: skip


def test_two_ranks_hold_slices_of_the_same_weights(written, tiny_base: Path, tmp_path: Path, torchrun) -> None:
    """Of rows and of columns, where channels lie in another order, where a cut goes through a group or a block."""
    paths = [written(name).path for name in WRITERS]
    for to, kind in PACKED_BY_US:
        paths.append(tmp_path / f"{to}-{kind}")
        Destination(to, "fp32", quant_type=kind).write(open_base([tiny_base])[0], paths[-1])
    for path in paths:
        torch.save(logits(path), path / "logits.pt")
    done = torchrun(2, Path(__file__).with_name("packed_worker.py"), *paths)
    assert done.returncode == 0, done.stderr[-3000:]
    for path in paths:  # their lines may run into each other
        assert done.stdout.count(f"{path.name}: matrices 14 equal, logits close") == 2, done.stdout
