"""The launch scripts run from any directory with upstream's arguments, and the demo answers from what they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from accessory.config import FinetuneConfig, parse
from accessory.method.side_tuning import SideTuning
from tests.exps.recorded import FINETUNE, ROOT, run_recorded

SIDE_SCRIPTS = [*sorted((FINETUNE / "sg").glob("*Qst*.sh")), ROOT / "exps" / "qst-70b.sh"]
DATA = ROOT / "data_example" / "accessory_qa.json"


def run_script(script: Path, *arguments: str | Path, cwd: Path, environment: dict[str, str], ranks: int, output: Path):
    """Run a script with this Python's torchrun."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    variables = {"PATH": path, "NPROC": str(ranks), "DEVICE": "cpu", "OUTPUT": str(output)}
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment | variables, capture_output=True, text=True, timeout=200)


def called_by(script: Path, *arguments: str | Path, folder: Path, environment: dict[str, str]) -> FinetuneConfig:
    """What a script makes of its arguments: the flags that it gives to main_finetune.py on 3 processes."""
    words = run_recorded(script, *arguments, folder=folder, environment=environment, NPROC="3", DEVICE="cpu")
    assert words[:3] == ["--nproc_per_node", "3", "--standalone"]
    assert Path(words[3]) == ROOT / "accessory" / "main_finetune.py"
    return parse(FinetuneConfig, words[4:])


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Meta's params.json of the tiny base."""
    path = tmp_path_factory.mktemp("params") / "params.json"
    settings = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 256, "vocab_size": -1}
    path.write_text(json.dumps(settings | {"norm_eps": 1e-5}))
    return path


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
    script = FINETUNE / "sg" / "alpaca_llamaPeft_normBiasLora.sh"
    named = {"CONFIG": tiny_base / "config.json", "BASE": tiny_base}
    arguments = (tiny_base, *(named.get(word, word) for word in words), "--lr", "1")
    used = called_by(script, *arguments, folder=tmp_path, environment=clean_environment)
    assert (used.pretrained_path, used.lr) == ([tiny_base], 1)
    assert used.tokenizer_path == (tiny_base if "BASE" in words else None)
    assert used.llama_config[:-1] == ([tiny_base / "config.json"] if "CONFIG" in words else [])


def test_two_ranks_train_and_answer(tiny_base: Path, params: Path, tmp_path: Path, clean_environment, torchrun) -> None:
    script = FINETUNE / "sg" / "alpaca_llamaPeft_normBias_QF.sh"
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
        script = FINETUNE / "sg" / "alpaca_llamaPeft_normBias.sh"
        done = run_script(script, *words, cwd=tmp_path, environment=clean_environment, ranks=1, output=tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("usage: bash alpaca_llamaPeft_normBias.sh BASE [PARAMS_JSON|- [TOKENIZER|-]] [")
