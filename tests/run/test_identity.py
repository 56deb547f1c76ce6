"""Which flags all processes must be given alike, and where a run goes on whose data are other ones."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from accessory.checkpoint.training_state import Progress
from accessory.config import PretrainConfig
from accessory.run.identity import PretrainJob, shared_flags


def test_files_that_the_main_rank_looks_at_for_all_are_compared() -> None:
    """Where others would read other files, nothing else would tell."""
    flags = shared_flags(PretrainConfig(data_meta_path="a.json", data_root="here", tokenizer_path="there"))
    assert flags["data_meta_path"] == "a.json" and flags["data_root"] == "here"
    assert "tokenizer_path" not in flags  # whose vocabulary is compared instead


@pytest.mark.parametrize(("epochs", "said"), [(2, "a pass over them begins"), (1, "give more than --epochs 1")])
def test_pretraining_on_other_data_keeps_its_steps(epochs: int, said: str) -> None:
    job = SimpleNamespace(order=SimpleNamespace(steps_per_epoch=40), config=SimpleNamespace(epochs=epochs))
    progress, (told,) = PretrainJob.on_other_data(job, Progress(step=50, total_steps=50))
    assert (progress.epoch, progress.step, progress.total_steps) == (1, 10, 50) and said in told
