"""Flags -> a config: help, lists, empty values, and every fault at once with the nearest name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from accessory.config import DemoConfig, FinetuneConfig, parse, plain
from tests.config.refusal import refusal


@pytest.mark.parametrize("kind", [FinetuneConfig, DemoConfig])
def test_help_mentions_every_flag(kind: type[BaseModel], capsys: pytest.CaptureFixture[str]) -> None:
    """And what it is for; asking for help is no fault."""
    with pytest.raises(SystemExit) as caught:
        parse(kind, ["--help"])
    assert caught.value.code == 0
    shown = "".join(capsys.readouterr().out.split())  # lines are broken at spaces and hyphens
    for name, field in kind.model_fields.items():
        assert f"--{name}" in shown
        assert "".join(field.description.split()) in shown, name
    if kind is FinetuneConfig:
        assert "--no_pin_mem" in shown and "Default:bf16." in shown and "Required." in shown


def test_values_become_what_they_should(paths: list[str]) -> None:
    """Numbers, switches, lists and paths."""
    config = parse(FinetuneConfig, [
        *paths, "--clip_grad", "0.5", "--lr", "2e-5", "--epochs", "4", "--no_pin_mem", "--quant",
        "--only_save_trainable", "--max_steps", "7", "--min_lr=0",
    ])  # fmt: skip
    assert config.clip_grad == 0.5 and isinstance(config.clip_grad, float)
    assert (config.lr, config.epochs, config.max_steps, config.min_lr) == (2e-5, 4, 7, 0.0)
    assert config.pin_mem is False and config.quant is True
    assert config.pretrained_path == [Path(paths[1])]
    assert parse(FinetuneConfig, [*paths, "--pin_mem"]).pin_mem is True
    assert parse(FinetuneConfig, [*paths, "--clip_grad", "-1"]).clip_grad == -1.0


def test_empty_value_means_none(paths: list[str]) -> None:
    """Upstream's way to save nothing."""
    assert parse(FinetuneConfig, [*paths, "--output_dir", ""]).output_dir is None
    assert parse(FinetuneConfig, [*paths, "--resume", ""]).resume is None


def test_lists(paths: list[str], tmp_path: Path) -> None:
    """Several files of a flag, none, and the last occurrence of a repeated flag."""
    for name in ("a.json", "b.json"):
        (tmp_path / name).touch()
    both = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert parse(FinetuneConfig, [*paths, "--llama_config", *both]).llama_config == [Path(path) for path in both]
    assert parse(FinetuneConfig, [*paths, "--llama_config"]).llama_config == []
    assert parse(FinetuneConfig, [*paths, "--seed", "1", "--seed", "2"]).seed == 2


def test_unknown_flags(paths: list[str]) -> None:
    """Each with the nearest name; its value is not complained about, nor is a prefix taken for the flag."""
    assert refusal([*paths, "--epoch", "3", "--quantt", "--zzz=1"]) == [
        "Unknown flag --epoch. Did you mean '--epochs'?",
        "Unknown flag --quantt. Did you mean '--quant'?",
        "Unknown flag --zzz.",
    ]
    assert refusal([*paths, "--batch", "3"]) == ["Unknown flag --batch. Did you mean '--batch_size'?"]
    assert refusal(["stray", *paths]) == ["'stray' belongs to no flag."]


@pytest.mark.parametrize(("flag", "said"), [
    ("--lora_rank", "LoRA's rank is --lora_r, or \"lora_rank\" in a JSON file of --llama_config."),
    ("--max_grad_norm", "--clip_grad is what the gradient's norm is clipped to."),
    ("--learning-rate", "--lr is the highest learning rate."),
    ("--master_port",
     "torchrun starts the processes: torchrun --nproc-per-node=N, with its other flags, before the script."),
])  # fmt: skip
def test_flags_of_others(paths: list[str], flag: str, said: str) -> None:
    """The error says what they are called here."""
    assert refusal([*paths, flag, "1"]) == [f"Unknown flag {flag}: {said}"]


def test_a_name_means_what_the_entry_can_do(paths: list[str]) -> None:
    """--max_length is --max_words in training and --max_seq_len in the demo; no hint where there is no such flag."""
    assert "--max_words" in refusal([*paths, "--max_length", "9"])[0]
    assert "--max_seq_len" in refusal([*paths[:2], "--max_length", "9"], DemoConfig)[0]
    assert "a free port" in refusal([*paths[:2], "--n_gpus", "2", "--master_port", "23560"], DemoConfig)[0]
    assert refusal([*paths[:2], "--gradient_accumulation_steps", "9"], DemoConfig) == [
        "Unknown flag --gradient_accumulation_steps."
    ]


def test_empty_values(paths: list[str]) -> None:
    """An unset variable of the shell is taken neither for the current directory nor for an absent flag."""
    said = "'': expected a value; is a variable of the shell empty?"
    assert refusal(["--pretrained_path", "", "--data_config", ""]) == [
        f"--pretrained_path {said}",
        f"--data_config {said}",
    ]
    assert refusal([*paths[:2], "--prompt", "hi", ""], DemoConfig) == [f"--prompt {said}"]


def test_assignments_are_no_flags(paths: list[str]) -> None:
    """As torchtune and LLaMA-Factory write them."""
    assert refusal(["lr=1e-4", *paths]) == ["'lr=1e-4' belongs to no flag: flags are written --name value."]


def test_all_faults_at_once(paths: list[str]) -> None:
    """Unknown flags, values out of range and of a wrong kind together."""
    lines = refusal(
        [*paths, "--lrr", "1", "--epochs", "0", "--lr", "fast", "--precision", "int8", "--quant_type", "nf5"]
    )
    assert lines[0] == "Unknown flag --lrr. Did you mean '--lr'?"
    assert sorted(line.split()[0] for line in lines[1:]) == ["--epochs", "--lr", "--precision", "--quant_type"]
    assert any(
        line.startswith("--precision is 'int8': Input should be 'bf16', 'fp16', 'fp32' or 'tf32'") for line in lines
    )
    assert any(line.endswith(" or 'mix3.0'. Did you mean 'nf4'?") for line in lines)
    assert any(line.startswith("--epochs is '0': Input should be greater than or equal to 1") for line in lines)


def test_required_flags() -> None:
    """Both named."""
    assert refusal([]) == ["--pretrained_path is required and missing.", "--data_config is required and missing."]
    assert refusal(["--pretrained_path"]) == ["Argument --pretrained_path: expected at least one argument."]


def test_plain_is_json_and_comes_back(paths: list[str]) -> None:
    """run.json holds every argument."""
    config = parse(FinetuneConfig, [*paths, "--output_dir", "", "--lr", "3e-4"])
    values = json.loads(json.dumps(plain(config)))
    assert values.keys() == FinetuneConfig.model_fields.keys()
    assert FinetuneConfig(**values) == config
