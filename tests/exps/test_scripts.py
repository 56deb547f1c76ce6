"""The launch scripts run from any directory with upstream's arguments, and the demo answers from what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accessory.config import FinetuneConfig, parse
from accessory.method.peft import Peft
from accessory.method.side_tuning import SideTuning

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = sorted((ROOT / "exps" / "finetune" / "sg").glob("alpaca_*Peft*.sh"))
OTHERS = {
    "dialog_sharegpt": (3, 0.04, 4, 8, 4096, 2e-5, 0, 0),
    "dialog_sharegpt_llamaPeft_normBiasLora": (4, 1, 4, 2, 4096, 5e-5, 5e-6, 0.02),
    "gorilla": (3, 0.04, 4, 8, 512, 2e-5, 0, 0),
    "gorilla_llamaPeft_normBias": (10, 2, 4, 2, 512, 1e-3, 5e-6, 0.02),
    "gorilla_llamaPeft_normBiasLora": (10, 2, 4, 2, 512, 1e-3, 5e-6, 0.02),
    "platypus": (3, 0.04, 4, 8, 512, 2e-5, 0, 0),
    "platypus_llamaPeft_normBias_QF": (4, 1, 4, 2, 512, 5e-5, 5e-6, 0.02),
}
"""Script -> upstream's epochs, warm-up, documents, micro-batches, greatest length, rates at the top and end, decay."""
SIDE_SCRIPTS = [*sorted((ROOT / "exps" / "finetune" / "sg").glob("*Qst*.sh")), ROOT / "exps" / "qst-70b.sh"]
DATA = ROOT / "data_example" / "accessory_qa.json"


RECORDER = """#!{python}
import json, sys
from pathlib import Path
Path({record!r}).write_text(json.dumps(sys.argv[1:]))
"""
"""Takes torchrun's place where a test asks only what the script calls."""


def run_script(script: Path, *arguments: str | Path, cwd: Path, environment: dict[str, str], ranks: int, output: Path):
    """Run a script with this Python's torchrun."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    variables = {"PATH": path, "NPROC": str(ranks), "DEVICE": "cpu", "OUTPUT": str(output)}
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=200)


def called_by(script: Path, *arguments: str | Path, folder: Path, environment: dict[str, str]) -> FinetuneConfig:
    """What a script makes of its arguments: the flags that it gives to main_finetune.py on 3 processes."""
    (folder / "bin").mkdir()
    recorder = folder / "bin" / "torchrun"
    recorder.write_text(RECORDER.format(python=sys.executable, record=str(folder / "record.json")))
    recorder.chmod(0o755)
    path = f"{folder / 'bin'}{os.pathsep}{environment['PATH']}"
    variables = {"PATH": path, "NPROC": "3", "DEVICE": "cpu", "OUTPUT": str(folder / "out")}
    command = ["bash", str(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *launcher, main = (words := json.loads((folder / "record.json").read_text()))[:4]
    assert (
        launcher == ["--nproc_per_node", "3", "--standalone"] and Path(main) == ROOT / "accessory" / "main_finetune.py"
    )
    return parse(FinetuneConfig, words[4:])


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Meta's params.json of the tiny base."""
    path = tmp_path_factory.mktemp("params") / "params.json"
    settings = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256, "vocab_size": -1}
    path.write_text(json.dumps(settings | {"norm_eps": 1e-5}))
    return path


def test_which_scripts_there_are() -> None:
    stem = "alpaca_llamaPeft_normBias"
    assert {s.stem for s in SCRIPTS} == {stem, f"{stem}Lora", f"{stem}_QF", f"{stem}Lora_QF"}
    assert {s.stem for s in SIDE_SCRIPTS} == {"alpaca_llamaQst_QF", "alpaca_optQst_QF", "qst-70b"}
    others = {ROOT / "exps" / "finetune" / "sg" / f"{name}.sh" for name in OTHERS}
    assert set((ROOT / "exps" / "finetune" / "sg").glob("*.sh")) == {*SCRIPTS, *SIDE_SCRIPTS[:2], *others}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_gives_upstreams_values(
    script: Path, tiny_base: Path, params: Path, tmp_path: Path, clean_environment
) -> None:
    more = ("--data_config", DATA, "--max_steps", "1")
    used = called_by(script, tiny_base, params, tiny_base, *more, folder=tmp_path, environment=clean_environment)
    assert (used.data_config, used.max_steps) == ([DATA], 1)
    assert used.output_dir == tmp_path / "out" / "finetune" / "sg" / script.stem
    assert used.quant == used.only_save_trainable == script.stem.endswith("_QF")
    names = ("epochs", "warmup_epochs", "batch_size", "accum_iter", "max_words", "lr", "min_lr", "clip_grad")
    assert [getattr(used, name) for name in names] == [4, 1, 4, 2, 512, 5e-5, 5e-6, 2]
    assert used.weight_decay == 0.02
    assert used.checkpointing
    assert used.llama_config[0] == params
    settings = Peft.Settings(**(json.loads(used.llama_config[1].read_text()) if used.llama_config[1:] else {}))
    assert settings.lora_rank == (16 if "Lora" in script.stem else -1)
    assert settings.bias_tuning
    assert settings.norm_tuning


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_have_upstreams_values_too(name: str, tiny_base: Path, tmp_path: Path, clean_environment) -> None:
    script = ROOT / "exps" / "finetune" / "sg" / f"{name}.sh"
    used = called_by(script, tiny_base, folder=tmp_path, environment=clean_environment)
    names = ("epochs", "warmup_epochs", "batch_size", "accum_iter", "max_words", "lr", "min_lr", "weight_decay")
    assert tuple(getattr(used, flag) for flag in names) == OTHERS[name]
    assert used.output_dir == tmp_path / "out" / "finetune" / "sg" / name and (used.clip_grad, used.checkpointing) == (
        2,
        "all",
    )
    assert used.data_config == [ROOT / "configs" / "data" / "finetune" / "sg" / f"{name.partition('_llama')[0]}.yaml"]
    assert used.dialog == name.startswith("dialog") and used.quant == used.only_save_trainable == name.endswith("_QF")
    assert used.llama_type == ("llama_peft" if "Peft" in name else "llama")
    settings = Peft.Settings(**(json.loads(used.llama_config[0].read_text()) if used.llama_config else {}))
    assert settings.lora_rank == (16 if "Lora" in name else -1)


@pytest.mark.parametrize("script", SIDE_SCRIPTS, ids=lambda script: script.stem)
def test_side_tuning_has_the_published_values(script: Path, tmp_path: Path, tiny_base: Path, clean_environment) -> None:
    """Of the published script for the 70B, and of the paper for Alpaca (its appendix B)."""
    used = called_by(script, tiny_base, "--data_config", DATA, folder=tmp_path, environment=clean_environment)
    large = script.stem == "qst-70b"
    assert used.output_dir == tmp_path / "out" / (script.stem if large else f"finetune/sg/{script.stem}")
    assert used.llama_type == ("opt_qst" if "opt" in script.stem else "llama_qst")
    assert used.quant and used.only_save_trainable and used.checkpointing == "none" and used.dialog == large
    names = ("batch_size", "accum_iter", "max_words", "max_steps", "save_steps", "lr")
    expected = [1, 16, 512 + 512, 1875, 200, 1e-4] if large else [4, 1, 512, None, None, 2e-4]
    assert [getattr(used, name) for name in names] == expected
    assert (used.lr_schedule, used.adam_beta2, used.clip_grad, used.weight_decay) == ("constant", 0.999, 0.3, 0)
    steps = 9846 / 16 if large else 1  # OpenAssistant's best replies: the warm-up is a share of the run
    assert used.warmup_epochs * steps == pytest.approx(0.03 * (1875 if large else used.epochs), rel=0.02)
    settings = SideTuning.Settings(**SideTuning.translated(json.loads(used.llama_config[0].read_text())))
    assert (settings.r, settings.peft_hidden_size, settings.adapter_activation) == (16, 16, "silu")
    assert (settings.dropout, settings.add_layer_norm_after_adapter, settings.start) == (0.1, True, "base")
    assert (settings.side_layers, settings.tail) == (1, 0)


@pytest.mark.parametrize("words", [[], ["-", "BASE"], ["CONFIG", "-"]], ids=" ".join)
def test_a_base_that_brings_its_own(words: list[str], tiny_base: Path, tmp_path: Path, clean_environment) -> None:
    """With a Hugging Face directory, params and tokenizer may be left out, `-`, or its own files."""
    script = next(s for s in SCRIPTS if s.stem == "alpaca_llamaPeft_normBiasLora")
    named = {"CONFIG": tiny_base / "config.json", "BASE": tiny_base}
    arguments = (tiny_base, *(named.get(word, word) for word in words), "--lr", "1")
    used = called_by(script, *arguments, folder=tmp_path, environment=clean_environment)
    assert (used.pretrained_path, used.lr) == ([tiny_base], 1)
    assert used.tokenizer_path == (tiny_base if "BASE" in words else None)
    assert used.llama_config[:-1] == ([tiny_base / "config.json"] if "CONFIG" in words else [])


def test_two_ranks_train_and_answer(tiny_base: Path, params: Path, tmp_path: Path, clean_environment, torchrun) -> None:
    script = next(s for s in SCRIPTS if s.stem == "alpaca_llamaPeft_normBias_QF")
    more = ("--data_config", DATA, "--model_parallel_size", "2", "--max_steps", "2")
    done = run_script(
        script, tiny_base, params, tiny_base, *more,
        cwd=tmp_path, environment=clean_environment, ranks=2, output=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = tmp_path / "finetune" / "sg" / script.stem
    assert "step      2/2" in (folder / "output.log").read_text()
    (trained,) = folder.glob("epoch*")
    asked = torchrun(
        2, ROOT / "demos" / "single_turn.py", "--pretrained_path", tiny_base, trained, "--quant", "--device", "cpu",
        "--max_gen_len", "5", "--prompt", "What is QST?",
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert asked.stdout.startswith("Q: What is QST?\nA: ")


def test_side_tuning_trains_and_answers(
    tiny_base: Path, params: Path, tmp_path: Path, clean_environment, python
) -> None:
    """On OpenAssistant's file, as it is downloaded."""
    folder = tmp_path / "data" / "oasst1"
    folder.mkdir(parents=True)
    lines = [{"text": "### Human: What is QST?### Assistant: Side tuning.### Human: Why?### Assistant: Less memory."}]
    lines *= 16
    (folder / "openassistant_best_replies_train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    script = next(s for s in SIDE_SCRIPTS if s.stem == "qst-70b")
    more = ("--data_dir", tmp_path / "data", "--max_steps", "1")
    done = run_script(
        script, tiny_base, params, *more, cwd=tmp_path, environment=clean_environment, ranks=1, output=tmp_path
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    turns = "What is QST?\n### Assistant:« Side tuning.\n###» Human: Why?\n### Assistant:« Less memory."
    assert turns in done.stdout, done.stdout
    (trained,) = (tmp_path / "qst-70b").glob("epoch*")
    asked = python("demos/single_turn.py", "--pretrained_path", trained, "--max_gen_len", "5", "--prompt", "Why?")
    assert asked.returncode == 0, asked.stderr[-2000:]
    assert asked.stdout.startswith("Q: Why?\nA: ")


def test_usage_without_arguments(tmp_path: Path, clean_environment) -> None:
    for words in ([], ["--help"]):
        done = run_script(SCRIPTS[0], *words, cwd=tmp_path, environment=clean_environment, ranks=1, output=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: bash alpaca_llamaPeft_normBias.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [")
