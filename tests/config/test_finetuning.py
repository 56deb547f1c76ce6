"""Flags of fine-tuning: upstream's all exist, are described, and are checked together."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from accessory.config import DemoConfig, FinetuneConfig, PretrainConfig, parse, plain
from accessory.config.command_line import required_first
from accessory.errors import ConfigError
from tests.config.refusal import refusal
from tests.flags_table import flags_table

UPSTREAM = {
    "batch_size": 16, "accum_iter": 4, "llama_type": "llama", "llama_config": [], "no_visual": False,
    "tokenizer_path": None, "pretrained_path": None, "pretrained_type": None, "weight_decay": 0.02, "lr": 0.001,
    "min_lr": 0.0001, "epochs": 3, "warmup_epochs": 0.3, "clip_grad": -1.0, "max_words": 1024, "dialog": False,
    "data_config": None, "image_transform": "random_resized_crop", "cache_ann_on_disk": False,
    "output_dir": Path("output_dir"), "save_interval": 1, "save_iteration_interval": 5000,
    "only_save_trainable": False, "seed": 0, "resume": None, "num_workers": 2, "pin_mem": True, "dist_on_itp": False,
    "model_parallel_size": 1, "data_parallel": "sdp", "precision": "bf16", "checkpointing": "none", "quant": False,
}  # fmt: skip
"""LLaMA2-Accessory's flags of main_finetune.py and their defaults; ours differ on purpose for the paths (upstream's are
placeholders), --epochs (400 there), --warmup_epochs (1 there, here a tenth of them) and --checkpointing (a switch
there, which is what it still is without a value)."""


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstreams_flag_exists(paths: list[str], name: str) -> None:
    """With its default."""
    config = parse(FinetuneConfig, paths)
    assert name in FinetuneConfig.model_fields
    if name not in ("pretrained_path", "data_config"):
        assert getattr(config, name) == UPSTREAM[name]


@pytest.mark.parametrize("kind", [FinetuneConfig, PretrainConfig, DemoConfig])
def test_every_flag_is_described(kind: type[BaseModel]) -> None:
    """By a whole sentence, in one line of the help and one row of the table."""
    table = flags_table(kind).splitlines()
    assert len(table) == 2 + len(kind.model_fields)
    for row, (name, field) in zip(table[2:], required_first(kind).items(), strict=True):
        assert len(field.description) > 10 and field.description.endswith("."), name
        assert row.startswith(f"| `--{name}` | ") and row.count(" | ") == 2 and row.endswith(" |")
        assert field.description.replace("|", "/") in row


def test_table_shows_defaults() -> None:
    """Required, on, a value in code, or nothing."""
    cells = {row.split("`")[1]: row.split(" | ")[1] for row in flags_table(FinetuneConfig).splitlines()[2:]}
    assert cells["--data_config"] == cells["--pretrained_path"] == "required"
    assert (cells["--pin_mem"], cells["--quant"], cells["--resume"], cells["--llama_config"]) == ("on", "", "", "")
    assert (cells["--lr"], cells["--seed"], cells["--output_dir"]) == ("`0.001`", "`0`", "`output_dir`")


def test_flags_that_would_do_nothing(paths: list[str]) -> None:
    """They are refused, not ignored."""
    assert refusal([*paths, "--teacher_weight", "0.3"]) == [
        "--teacher_weight without --teacher changes nothing: give both, or neither."
    ]
    assert refusal([*paths, "--quant_type", "nf4"]) == [
        "--quant_type nf4 without --quant changes nothing: give both, or neither."
    ]
    assert refusal([*paths, "--quant_targets", "lora", "wo"]) == [
        "--quant_targets without --quant changes nothing: give both, or neither."
    ]
    assert refusal([*paths[:2], "--no_quant", "--quant_type", "fp4"], DemoConfig) == [
        "--quant_type fp4 contradicts --no_quant: leave one out."
    ]
    assert refusal([*paths, "--no_visual=1"]) == ["Argument --no_visual: is a switch and takes no value; found '1'."]
    assert refusal([*paths, "--no_visual", "yes"]) == [
        "'yes' belongs to no flag: --no_visual is a switch and takes no value."
    ]


@pytest.mark.parametrize("more", [["--lr_schedule", "constant"], ["--lr", "3e-4"], ["--teacher", "base", "--quant"]])
def test_a_runs_own_arguments_can_be_given_back(paths: list[str], more: list[str]) -> None:
    """As `run.json` has them, defaults and all."""
    config = parse(FinetuneConfig, [*paths, "--only_save_trainable", *more])
    again = FinetuneConfig(**plain(config))
    assert again == config and again.faults() == config.faults()


@pytest.mark.parametrize(("bits", "quant"), [("4", (True, None)), ("8", (True, "int8")), ("16", (False, None))])
def test_bits(paths: list[str], bits: str, quant: tuple[bool, str | None]) -> None:
    """Another name of --quant, from Python too; what contradicts it is refused."""
    more = [*paths, "--only_save_trainable", "--bits", bits]
    config = parse(FinetuneConfig, more)
    assert (config.quant, config.quant_type) == quant
    given = plain(config) | {"bits": int(bits)}
    assert FinetuneConfig(**given) == config and not config.faults()
    if bits == "16":
        assert refusal([*more, "--quant"]) == ["--bits 16 contradicts --quant: leave one out."]
        return
    assert parse(FinetuneConfig, [*more, "--quant"]) == config
    of_these, others = ("fp4", "int8") if bits == "4" else ("llm_int8", "nf4")
    assert parse(FinetuneConfig, [*more, "--quant_type", of_these]).quant_type == of_these
    contradiction = f"--bits {bits} contradicts --quant_type {others}: leave one out."
    assert refusal([*more, "--quant_type", others]) == [contradiction]
    assert FinetuneConfig(**given | {"quant": False, "quant_type": None}).faults() == [
        f"--bits {bits} contradicts quant False: leave one out."
    ]


@pytest.mark.parametrize(("flag", "value"), [
    ("batch_size", "0"), ("accum_iter", "0"), ("epochs", "0"), ("warmup_epochs", "-1"), ("lr", "0"), ("lr", "nan"),
    ("lr", "inf"), ("clip_grad", "nan"), ("min_lr", "-1"), ("max_words", "1"), ("model_parallel_size", "0"),
    ("data_parallel", "ddp"), ("save_interval", "0"), ("save_iteration_interval", "0"), ("num_workers", "-1"),
    ("bits", "3"), ("max_memory", "0"), ("max_memory", "24 parsecs"), ("lora_r", "0"), ("lora_dropout", "1"),
    ("max_steps", "0"), ("device", "tpu"), ("pretrained_type", "hf"), ("weight_decay", "-0.1"), ("seed", "-1"),
    ("epochs", "1.5"), ("max_tokens", "1"), ("optim", "sgd"),
])  # fmt: skip
def test_bad_values(paths: list[str], flag: str, value: str) -> None:
    """Named with the flag and what was given."""
    (line,) = refusal([*paths, f"--{flag}", value])
    assert line.startswith(f"--{flag} is '{value}': ")


def test_values_that_follow_from_others(paths: list[str]) -> None:
    """min_lr is a tenth of lr, warmup_epochs a tenth of epochs, unless given; a wrong lr or epochs is one fault."""

    def found(*flags: str) -> tuple[float, float]:
        config = parse(FinetuneConfig, [*paths, *flags])
        return config.min_lr, config.warmup_epochs

    assert found() == pytest.approx((1e-4, 0.3))
    assert found("--lr", "5e-5", "--epochs", "1") == pytest.approx((5e-6, 0.1))
    assert found("--epochs", "40") == pytest.approx((1e-4, 1))
    assert found("--lr", "5e-5", "--min_lr", "5e-5", "--epochs", "1", "--warmup_epochs", "1") == (5e-5, 1)
    assert refusal([*paths, "--lr", "0"]) == ["--lr is '0': Input should be greater than 0."]
    assert all(row.count("Undefined") == 0 for row in flags_table(FinetuneConfig).splitlines())


def test_combinations_and_files(paths: list[str], tmp_path: Path) -> None:
    """Found after the values are right, and all at once too."""
    gone = str(tmp_path / "gone")
    lines = refusal([
        *paths, "--quant", "--min_lr", "0.1", "--lr", "0.01", "--llama_config", gone, "--tokenizer_path", gone,
        "--resume", gone,
    ])  # fmt: skip
    assert lines == [
        "--quant needs --only_save_trainable: a 4-bit base is never written with the trained part.",
        "--min_lr 0.1 is above --lr 0.01.",
        f"--llama_config {gone}: no such file or directory.",
        f"--tokenizer_path {gone}: no such file or directory.",
        f"--resume {gone}: no such file or directory.",
    ]
    assert refusal([*paths, "--lr_schedule", "constant", "--min_lr", "0"]) == [
        "--min_lr 0.0 with --lr_schedule constant changes nothing: leave one out."
    ]
    without = "--offload_inputs needs --checkpointing: it moves the inputs of the layers recomputed."
    assert (
        refusal([*paths, "--offload_inputs"]) == refusal([*paths, "--offload_inputs", "--checkpointing=0"]) == [without]
    )
    assert parse(FinetuneConfig, [*paths, "--offload_inputs", "--checkpointing"]).offload_inputs
    assert refusal(["--pretrained_path", gone, "--data_config", gone]) == [
        f"--pretrained_path {gone}: no such file or directory.", f"--data_config {gone} is not there.",
    ]  # fmt: skip
    taken = "--cache_base out is the --output_dir: give a directory of its own."
    assert refusal([*paths, "--cache_base", "out", "--output_dir", "out"]) == [taken]


def test_in_python(tmp_path: Path) -> None:
    """One value where several may stand; an unknown key is answered with ours, as a flag is."""
    config = FinetuneConfig(pretrained_path="base", data_config="data.json", llama_config=tmp_path, new_tokens="<a>")
    assert (config.pretrained_path, config.llama_config, config.new_tokens) == ([Path("base")], [tmp_path], ["<a>"])
    with pytest.raises(
        ConfigError, match=r"(?s)unknown key 'learning_rate': --lr is .*unknown key 'sed'\. Did you mean 'seed'"
    ):
        FinetuneConfig(pretrained_path="base", data_config="data.json", learning_rate=1e-3, sed=3)
    with pytest.raises(ConfigError, match=r"(?s)--quant needs --only_save_trainable.*base: no such file"):
        FinetuneConfig(pretrained_path="base", data_config="data.json", quant=True).check()


@pytest.mark.parametrize(("flags", "fault"), [
    ("--patience 3", "--patience needs documents to evaluate on: give --val_data FILE or --val_split 0.02."),
    ("--sample_prompts a", "--sample_prompts needs documents to evaluate on"),
    ("--eval_epochs 0.5", "--eval_epochs needs documents to evaluate on"),
    ("--val_split 0.1 --eval_steps 0", "--eval_steps is '0': Input should be greater than or equal to 1"),
    ("--val_split 1.5", "--val_split is '1.5': Input should be less than 1"),
    ("--val_split 0.1 --eval_steps 5 --eval_epochs 1", "--eval_steps and --eval_epochs contradict each other"),
    ("--val_split 0.1 --val_data DATA", "--val_data and --val_split contradict each other: leave one out."),
    ("--val_data nowhere.json", "--val_data nowhere.json is neither in "),
    ("--report_to none,wandb", "--report_to none,wandb: none goes with nothing else."),
    ("--report_to tensorbord", "'tensorboard', 'wandb' or 'none'"),
])  # fmt: skip
def test_faults_of_evaluation(paths: list[str], flags: str, fault: str) -> None:
    given = flags.replace("DATA", paths[-1]).split()
    assert any(fault in line for line in refusal([*paths, *given])), refusal([*paths, *given])
