"""Flags of pretraining: what they begin as, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from accessory.config import PretrainConfig, parse
from tests.config.refusal import refusal


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """What is needed to begin from random weights."""
    for name in ("params.json", "files.json", "tokenizer.model"):
        (tmp_path / name).write_text("{}")
    flags = {"llama_config": "params.json", "tokenizer_path": "tokenizer.model", "data_meta_path": "files.json"}
    return [word for flag, name in flags.items() for word in (f"--{flag}", str(tmp_path / name))]


def test_defaults_are_upstreams(paths: list[str]) -> None:
    config = parse(PretrainConfig, paths)
    expected = {
        "batch_size": 4, "accum_iter": 4, "lr": 1e-3, "min_lr": 1e-4, "warmup_iters": 20_000, "max_words": 2048,
        "lr_decay_iters": 1_800_000, "clip_grad": -1, "weight_decay": 0.02, "save_freq": 5000, "num_workers": 5,
        "packed_data": False, "data_root": None, "pretrained_path": [], "precision": "bf16", "data_parallel": "sdp",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.shuffle_bytes == 1_000_000


@pytest.mark.parametrize(("flags", "said"), [
    (["--warmup_iters", "9", "--lr_decay_iters", "8"], "--lr_decay_iters 8 is below --warmup_iters 9."),
    (["--packed_data", "--text_key", "x"], "--text_key x: --packed_data are tokens, which have no keys"),
    (["--data_root", "nowhere"], "--data_root nowhere: no such file or directory."),
    (["--min_lr", "1"], "--min_lr 1.0 is above --lr 0.001."),
    (["--quant"], "Unknown flag --quant"),
    (["--txt", "line"], "'line': Input should be 'whole', 'lines' or 'paragraphs'. Did you mean 'lines'?"),
    (["--shuffle_buffer", "1 XB"], "expected a size above 0 such as 24GB"),
    (["--shuffle_buffer", "1000000"], "--shuffle_buffer 1000000: expected a byte or more, with a unit, such as 1MB."),
    (["--shuffle_buffer", "0.0000001MB"], "--shuffle_buffer 0.0000001MB: expected a byte or more"),
])  # fmt: skip
def test_what_cannot_be_is_refused(flags: list[str], said: str, paths: list[str]) -> None:
    assert any(said in line for line in refusal([*paths, *flags], PretrainConfig))


def test_a_new_model_needs_settings_and_tokenizer(paths: list[str]) -> None:
    assert refusal(paths[-2:], PretrainConfig) == [
        "--llama_config is needed where there is no --pretrained_path.",
        "--tokenizer_path is needed where there is no --pretrained_path.",
    ]
