"""The scripts of pretraining take upstream's arguments, give its values, and train from any directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from accessory.config import PretrainConfig, parse
from accessory.parallel import groups
from tests.data.raw.texts import made, written
from tests.exps.recorded import ROOT, run_recorded

UPSTREAM = {
    "batch_size": 4, "accum_iter": 16, "num_workers": 4, "max_words": 2048, "lr": 1e-4, "min_lr": 1e-5,
    "warmup_iters": 5000, "lr_decay_iters": 400_000, "clip_grad": 2, "weight_decay": 0.02, "data_parallel": "fsdp",
    "llama_type": "llama", "save_freq": 5000, "precision": "bf16", "checkpointing": "none", "seed": 0,
}  # fmt: skip
"""What both of upstream's scripts say, or leave at its parser's defaults."""
OWN = {"vanilla": (False, 1), "13B_packed": (True, 2)}
"""Script -> whether its data are packed, and how many processes share a model."""


def test_which_scripts_there_are() -> None:
    assert {path.stem for path in (ROOT / "exps" / "pretrain").glob("*.sh")} == {*OWN, "pretrain"}


@pytest.mark.parametrize("name", OWN)
def test_values_are_upstreams(name: str, tmp_path: Path, clean_environment) -> None:
    script = ROOT / "exps" / "pretrain" / f"{name}.sh"
    words = ("params.json", "TOKENIZER", "files.json")
    for more in ([], ["DATA", "--max_words", "512"]):
        called = run_recorded(script, *words, *more, folder=tmp_path, environment=clean_environment, NPROC="3")
        assert called[:3] == ["--nproc_per_node", "3", "--standalone"]
        assert called[3] == str(ROOT / "accessory" / "main_pretrain.py")
        for path in ("params.json", "files.json", "TOKENIZER", "DATA"):
            (tmp_path / path).mkdir(exist_ok=True) if path.isupper() else (tmp_path / path).write_text("{}")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            used = parse(PretrainConfig, called[4:])
        expected = {**UPSTREAM, **({"max_words": 512} if more else {})}
        assert {flag: getattr(used, flag) for flag in expected} == expected
        assert (used.packed_data, used.model_parallel_size) == OWN[name]
        assert (used.pretrained_path, used.llama_config) == ([], [Path("params.json")])
        assert used.output_dir == tmp_path / "out" / "pretrain" / name
        assert used.data_root == (Path("DATA") if more else None)


def test_a_script_trains(tiny_base: Path, tmp_path: Path, clean_environment, shell) -> None:
    names = ["a.jsonl", "b.txt", "validation.jsonl"]
    for number, name in enumerate(names):
        written(tmp_path / name, made(6, number))
    (tmp_path / "files.json").write_text(json.dumps(names))
    (tmp_path / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 4}))
    few = "--max_words 64 --accum_iter 1 --max_steps 2 --num_workers 0 --precision fp32"
    line = (
        f"NPROC=1 DEVICE=cpu OUTPUT={tmp_path} bash {ROOT}/exps/pretrain/vanilla.sh params.json {tiny_base} files.json"
    )
    done = shell(f"{line} . {few}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "pretrain" / "vanilla" / "epoch0-iter2" / "model.safetensors").is_file()
    assert "step      2/2" in (tmp_path / "pretrain" / "vanilla" / "output.log").read_text()
    usage = shell(f"bash {ROOT}/exps/pretrain/vanilla.sh params.json", cwd=tmp_path)
    assert usage.returncode == 2 and usage.stderr.startswith("usage: bash vanilla.sh PARAMS_JSON TOKENIZER FILES_JSON")


def test_the_script_for_files_of_tokens_starts(tiny_base: Path, tmp_path: Path, clean_environment, called) -> None:
    """A dry run of one process, on what tools/pack_data.py makes of texts."""
    texts = [tmp_path / name for name in ("a.jsonl", "validation.jsonl")]
    for number, path in enumerate(texts):
        written(path, made(6, number))
    packed = called("tools/pack_data.py", *texts, tmp_path / "packed", "--tokenizer_path", tiny_base, "--processes", 1)
    assert packed.returncode == 0, packed.stderr
    (tmp_path / "params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 4}))
    few = ("--device", "cpu", "--model_parallel_size", "1", "--max_words", "64", "--accum_iter", "1", "--dry_run")
    words = (tmp_path / "params.json", tiny_base, tmp_path / "packed" / "meta.json", *few)
    script = ROOT / "exps" / "pretrain" / "13B_packed.sh"
    flags = run_recorded(script, *words, folder=tmp_path, environment=clean_environment)[4:]
    done = called("accessory/main_pretrain.py", *flags)
    groups.stop()
    assert done.returncode == 0, done.stderr[-2000:]
