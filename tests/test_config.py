"""Flags: upstream's all exist, are described, checked together, and the help and docs/flags.md show each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from accessory.config import DemoConfig, FinetuneConfig, parse, plain
from accessory.errors import ConfigError
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


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """The two flags that are always needed, with files that exist."""
    (tmp_path / "base").mkdir()
    (tmp_path / "data.json").touch()
    return ["--pretrained_path", str(tmp_path / "base"), "--data_config", str(tmp_path / "data.json")]


def refusal(arguments: list[str], kind: type[BaseModel] = FinetuneConfig) -> list[str]:
    """Lines of the message against `arguments`."""
    with pytest.raises(ConfigError) as caught:
        parse(kind, arguments)
    return str(caught.value).splitlines()


@pytest.mark.parametrize("name", UPSTREAM)
def test_upstreams_flag_exists(paths: list[str], name: str) -> None:
    """With its default."""
    config = parse(FinetuneConfig, paths)
    assert name in FinetuneConfig.model_fields
    if name not in ("pretrained_path", "data_config"):
        assert getattr(config, name) == UPSTREAM[name]


@pytest.mark.parametrize("kind", [FinetuneConfig, DemoConfig])
def test_every_flag_is_described(kind: type[BaseModel]) -> None:
    """By a whole sentence, in one line of the help and one row of the table."""
    table = flags_table(kind).splitlines()
    assert len(table) == 2 + len(kind.model_fields)
    for row, (name, field) in zip(table[2:], kind.model_fields.items(), strict=True):
        assert len(field.description) > 10 and field.description.endswith("."), name
        assert row.startswith(f"| `--{name}` | ") and row.count(" | ") == 2 and row.endswith(" |")
        assert field.description.replace("|", "/") in row


def test_table_shows_defaults() -> None:
    """Required, on, a value in code, or nothing."""
    cells = {row.split("`")[1]: row.split(" | ")[1] for row in flags_table(FinetuneConfig).splitlines()[2:]}
    assert cells["--data_config"] == cells["--pretrained_path"] == "required"
    assert (cells["--pin_mem"], cells["--quant"], cells["--resume"], cells["--llama_config"]) == ("on", "", "", "")
    assert (cells["--lr"], cells["--seed"], cells["--output_dir"]) == ("`0.001`", "`0`", "`output_dir`")


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


@pytest.mark.parametrize(
    ("words", "value"),
    [([], "none"), (["none"], "none"), (["all"], "all"), (["auto"], "auto"), (["0"], 0), (["12"], 12)],
)
def test_checkpointing(paths: list[str], words: list[str], value: str | int) -> None:
    """None, all, as many as fit, or a number; a bare one is upstream's switch, wherever it stands."""
    assert parse(FinetuneConfig, [*paths, *(["--checkpointing"] if words else []), *words]).checkpointing == value
    assert parse(FinetuneConfig, [*paths, "--checkpointing", "--no_visual"]).checkpointing == "all"
    assert parse(FinetuneConfig, ["--quant", "--only_save_trainable", *paths, "--checkpointing"]).checkpointing == "all"


@pytest.mark.parametrize("value", ["some", "-1", "1.5", "al"])
def test_checkpointing_that_cannot_be(paths: list[str], value: str) -> None:
    """Said in one line, with what can."""
    assert refusal([*paths, f"--checkpointing={value}"]) == [
        f"--checkpointing is '{value}': Input should be 'none', 'all', 'auto' or a number of layers."
    ]


def test_checkpointing_as_it_was_recorded(paths: list[str]) -> None:
    """run.json of an earlier version has a switch's values; True must not be taken for one layer."""
    values = plain(parse(FinetuneConfig, paths))
    found = [FinetuneConfig(**values | {"checkpointing": value}).checkpointing for value in (True, False, 1, "all")]
    assert found == ["all", "none", 1, "all"]
    assert [type(value) for value in found] == [str, str, int, str]


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


def test_names_on_the_hub(paths: list[str]) -> None:
    """They are not fetched; the error gives the command that fetches them."""
    lines = refusal([*paths[2:], "--pretrained_path", "meta-llama/Llama-2-7b-hf", "--tokenizer_path", f"{paths[1]}/x"])
    assert lines == [
        "--pretrained_path meta-llama/Llama-2-7b-hf: no such file or directory. If this is a name on the Hugging Face "
        "Hub: download it first (hf download meta-llama/Llama-2-7b-hf --local-dir Llama-2-7b-hf), then give the "
        "directory.",
        f"--tokenizer_path {paths[1]}/x: no such file or directory.",
    ]


def test_paths_from_the_root_of_the_repository(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere, such as in accessory/, where upstream's users start: the error says where they lie."""
    monkeypatch.chdir(tmp_path)
    settings, data = (f"configs/{name}" for name in ("model/finetune/sg/llamaQst.json", "data/finetune/sg/alpaca.yaml"))
    lines = refusal([*paths[:2], "--llama_config", settings, "--data_config", data])
    root = Path(__file__).resolve().parents[1]
    assert lines[0] == (
        f"--llama_config {settings}: no such file or directory. There is {root / settings}: give that, or start in "
        f"{root}."
    )
    assert lines[1].endswith(f"--data_dir data. There is {root / data}: give that, or start in {root}.")


@pytest.mark.parametrize(("path", "fetched", "given"), [
    ("hf://a/b", "a/b", "the directory"), ("hf://a/b/c/d", "a/b --include 'c/d/*'", "b/c/d"),
    ("https://huggingface.co/a/b", "a/b", "the directory"),
])  # fmt: skip
def test_addresses_on_the_hub(paths: list[str], path: str, fetched: str, given: str) -> None:
    """`hf://` is what LLaMA2-Accessory fetches itself."""
    (line,) = refusal([*paths[2:], "--pretrained_path", path])
    assert line.endswith(f"(hf download {fetched} --local-dir b), then give {given}.")


def test_empty_values(paths: list[str]) -> None:
    """An unset variable of the shell is taken neither for the current directory nor for an absent flag."""
    said = "'': expected a value; is a variable of the shell empty?"
    assert refusal(["--pretrained_path", "", "--data_config", ""]) == [
        f"--pretrained_path {said}",
        f"--data_config {said}",
    ]
    assert refusal([*paths[:2], "--prompt", "hi", ""], DemoConfig) == [f"--prompt {said}"]


def test_a_directory_for_a_file(paths: list[str]) -> None:
    assert refusal([*paths, "--llama_config", paths[1]]) == [
        f"--llama_config {paths[1]}: is a directory; expected a JSON file."
    ]


def test_flags_that_would_do_nothing(paths: list[str]) -> None:
    """They are refused, not ignored."""
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


@pytest.mark.parametrize(
    ("given", "optim"), [("paged_adamw_32bit", "paged_adamw"), ("adamw_torch", "adamw"), ("adamw8bit", "adamw8bit")]
)
def test_optimizers_by_the_names_of_transformers(paths: list[str], given: str, optim: str) -> None:
    assert parse(FinetuneConfig, [*paths, "--optim", given]).optim == optim
    (said,) = refusal([*paths, "--optim", "paged_adamw_8bit"])
    assert said == "--optim is 'paged_adamw_8bit': Input should be 'adamw', 'adamw8bit' or 'paged_adamw'."


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


@pytest.mark.parametrize(
    ("stated", "size"),
    [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("80000MB", 8e10), ("1.5", 1.5e9), ("512mib", 2**29)],
)
def test_max_memory(paths: list[str], stated: str, size: float) -> None:
    """In bytes; as it was written in run.json."""
    config = parse(FinetuneConfig, [*paths, "--max_memory", stated])
    assert config.max_memory_bytes == FinetuneConfig(**plain(config)).max_memory_bytes == size
    assert parse(FinetuneConfig, paths).max_memory_bytes is None


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
    assert any(line.startswith("--epochs is '0': Input should be greater than or equal to 1") for line in lines)


def test_required_flags() -> None:
    """Both named."""
    assert refusal([]) == ["--pretrained_path is required and missing.", "--data_config is required and missing."]
    assert refusal(["--pretrained_path"]) == ["Argument --pretrained_path: expected at least one argument."]


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


def test_demo_flags(paths: list[str]) -> None:
    """What is not said stays open; a page that others reach needs a password."""
    config = parse(DemoConfig, paths[:2])
    assert config.quant is None and config.llama_type is None
    assert parse(DemoConfig, [*paths[:2], "--quant"]).quant is True
    assert parse(DemoConfig, [*paths[:2], "--no_quant"]).quant is False
    assert refusal([*paths[:2], "--host", "0.0.0.0"], DemoConfig) == [
        "--host 0.0.0.0 lets others reach the page: give a --password."
    ]
    assert parse(DemoConfig, [*paths[:2], "--host", "0.0.0.0", "--password", "x"]).host == "0.0.0.0"


def test_plain_is_json_and_comes_back(paths: list[str]) -> None:
    """run.json holds every argument."""
    config = parse(FinetuneConfig, [*paths, "--output_dir", "", "--lr", "3e-4"])
    values = json.loads(json.dumps(plain(config)))
    assert values.keys() == FinetuneConfig.model_fields.keys()
    assert FinetuneConfig(**values) == config


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


def test_trackers_are_words_or_one_with_commas(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose package is missing names the line that installs it."""
    assert parse(FinetuneConfig, paths).report_to == ["tensorboard"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    both = ["--report_to", "tensorboard,wandb"]
    assert "--report_to wandb: wandb is not installed. Install it with: pip install -e '.[wandb]'" in refusal(
        [*paths, *both]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert parse(FinetuneConfig, [*paths, *both]).report_to == ["tensorboard", "wandb"]
    assert parse(FinetuneConfig, [*paths, "--report_to", "wandb", "tensorboard"]).report_to == ["wandb", "tensorboard"]
