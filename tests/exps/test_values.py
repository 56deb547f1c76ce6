"""The scripts of exps/finetune/ have LLaMA2-Accessory's values, and every one starts on its own data."""

from __future__ import annotations

import base64
import json
import shlex
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from accessory.config import FinetuneConfig, parse
from accessory.model.args import ModelArgs
from accessory.parallel import groups
from tests.conftest import DATA as QUESTIONS
from tests.conftest import TINY_CONFIG, copy_tokenizer, write_model
from tests.exps.recorded import FINETUNE, ROOT, flags_in, run_recorded
from tests.exps.upstream import CONFIGS, DATA, LEFT_OUT, UPSTREAM, ours
from tests.here import run_here

OWN = {"sg/alpaca_llamaQst_QF", "sg/alpaca_optQst_QF"}
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""An image of one pixel."""
KINDS = {
    name: (name.endswith("internLM"), *(flags.get(key) for key in ("llama_type", "config", "data", "quant")))
    for name, flags in UPSTREAM.items()
}
"""Script -> what sets it apart from those that differ only in numbers."""
SMALL_PREFIX = {"prefix_layers": 1, "v_embed_dim": 32, "v_depth": 1, "v_num_heads": 2}
"""Of an adapter of the tiny model, which has two blocks; and of what brings CLIP's tokens to the prefix."""
ARGUMENTS = ("BASE", "PARAMS", "TOKENIZER")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory, clean_environment: dict[str, str]) -> dict[str, list[str]]:
    """Script -> the words that it gives to torchrun."""
    folder = tmp_path_factory.mktemp("calls")
    how = {"folder": folder, "environment": clean_environment}
    return {name: run_recorded(FINETUNE / f"{name}.sh", *ARGUMENTS, **how) for name in UPSTREAM}


def test_all_scripts_are_here_but_those_that_are_left_out() -> None:
    assert {f"{path.parent.name}/{path.stem}" for path in FINETUNE.glob("*/*.sh")} == {*UPSTREAM, *OWN}
    assert len(UPSTREAM) + len(LEFT_OUT) == 33 + 5


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_script_has_the_same_flags_and_values(name: str, calls: dict[str, list[str]]) -> None:
    output = Path(calls[name][calls[name].index("--output_dir") + 1])
    main = calls[name].index(str(ROOT / "accessory" / "main_finetune.py"))
    assert calls[name][:main] == ["--nproc_per_node", "8", "--standalone"]
    found = flags_in(calls[name][main + 1 :])
    values = {flag: ours(name, flag, value) for flag, value in UPSTREAM[name].items()}
    data, config, folder = (values.pop(key, None) for key in ("data", "config", "exp_name"))
    expected = {flag: [] if value is True else [value] for flag, value in values.items() if value is not None}
    expected |= {
        "pretrained_path": ["BASE"], "tokenizer_path": ["TOKENIZER"], "device": ["auto"],
        "llama_config": ["PARAMS", *([ROOT / "configs" / "model" / "finetune" / config] if config else [])],
        "data_config": [ROOT / "configs" / "data" / "finetune" / f"{data}.yaml"],
        "output_dir": [output.parents[2] / (folder or f"finetune/{name}")],
    }  # fmt: skip
    typed = [{flag: _typed(words) for flag, words in flags.items()} for flags in (found, expected)]
    assert typed[0] == typed[1]


def _typed(words: list[Any]) -> list[Any]:
    """Numbers as numbers, however they are written."""
    return [json.loads(word) if word[:1].isdigit() else word for word in map(str, words)]


@pytest.mark.parametrize("name", DATA)
def test_a_yaml_has_the_same_entries(name: str) -> None:
    path = ROOT / "configs" / "data" / "finetune" / f"{name}.yaml"
    entries = yaml.safe_load(path.read_text())["META"]
    files = [path.parent / entry["path"] for entry in entries]
    expected = [(ROOT / "data" / ours(name, "path", file), preprocess) for file, preprocess in DATA[name]]
    found = [(Path(str(file.resolve())), entry.get("preprocess")) for file, entry in zip(files, entries, strict=True)]
    assert found == expected
    assert [entry["type"] for entry in entries] == ["image_text" if images(file) else "text" for file, _ in DATA[name]]


def images(file: str) -> bool:
    """Whether a data set of upstream's has pictures."""
    return file.startswith(("llava", "vqa"))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_json_has_the_same_settings(name: str) -> None:
    path = ROOT / "configs" / "model" / f"{name}.json"
    settings = json.loads(path.read_text())
    assert settings == CONFIGS[name]
    if scale := settings.get("rope_scaling"):
        assert ModelArgs(dim=64, **settings).rope_scaling.factor == 1 / scale


def conversation(question: str, answer: str, human: str = "human", model: str = "gpt") -> dict[str, Any]:
    """A record in ShareGPT's form."""
    return {"id": "0", "conversations": [{"from": human, "value": question}, {"from": model, "value": answer}]}


def record(file: str, question: str, answer: str) -> dict[str, Any]:
    """A record as the file of this name is published."""
    if "APIBench" in file:
        return {"code": f"###Instruction: {question}\n###Output: {answer}", "api_call": "x()", "provider": "TensorFlow"}
    if file.startswith("llava"):
        return conversation(f"<image>\n{question}", answer) | {"image": "a.png"}
    if file.startswith("vqav2"):
        return {"instruction": question, "output": answer, "image": "train2017/a.png"}
    if file.startswith(("alpaca", "evol", "Open-Platypus")):
        return {"instruction": question, "input": "", "output": answer}
    return conversation(question, answer, model="assistant" if "BelleGroup" in file else "gpt")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository that has the data of all YAMLs, 4 records a file."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("accessory", "exps"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    for path in (folder / "configs" / "model").rglob("*Adapter*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | SMALL_PREFIX))
    questions = json.loads(QUESTIONS.read_text())[:4]
    for name, entries in DATA.items():
        for file in (ours(name, "path", there) for there, _ in entries):
            path = folder / "data" / file
            path = path if path.suffix else path / "train.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            records = [record(file, it["instruction"], it["output"]) for it in questions]
            lines = path.suffix == ".jsonl" or "APIBench" in file
            path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    pictures = folder / "data" / "coco" / "train2017"
    pictures.mkdir(parents=True)
    (pictures / "a.png").write_bytes(PNG)
    return folder


@pytest.fixture(scope="module")
def intern_lm(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny InternLM in Hugging Face's layout: LLaMA's block with biases on q, k, v and o."""
    directory = tmp_path_factory.mktemp("intern_lm")
    write_model(directory, TINY_CONFIG | {"num_key_value_heads": TINY_CONFIG["num_attention_heads"]})
    weights = load_file(directory / "model.safetensors")
    attention = [name for name in weights if "self_attn" in name]
    weights |= {name.replace("weight", "bias"): torch.zeros(TINY_CONFIG["hidden_size"]) for name in attention}
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(TINY_CONFIG | {"model_type": "internlm", "bias": True}))
    copy_tokenizer(tiny_base, directory)
    return directory


@pytest.fixture(scope="module")
def start(workshop: Path, clean_environment: dict[str, str]) -> Callable[..., None]:
    """(script, base, flags): start it in the workshop, on one process, which is this one; or, if `only_parsed`, read
    its flags and look whether the files are there.
    """

    def call(name: str, base: Path, *flags: str | Path, only_parsed: bool = False) -> None:
        script = workshop / "exps" / "finetune" / f"{name}.sh"
        more = (*flags, "--device", "cpu", "--model_parallel_size", "1")
        _, _, _, main, *words = run_recorded(script, base, *more, folder=workshop, environment=clean_environment)
        if only_parsed:
            parse(FinetuneConfig, words)
            return
        status = run_here(str(Path(main).relative_to(workshop)), *words)
        groups.stop()
        assert status == 0, shlex.join(words)

    return call


@pytest.fixture(scope="module")
def first_stage(start: Callable[..., None], workshop: Path, tiny_base: Path) -> Callable[[bool], Path]:
    """Whether with an adapter -> what the scripts for images go on from: a model that sees them, trained for a step."""
    pytest.importorskip("transformers", reason="the extra vision is not installed")
    from tests.vision.tiny import write_blip2, write_clip

    @cache
    def trained(adapter: bool) -> Path:
        output = workshop / f"first_stage_{adapter}"
        (output / "eyes").mkdir(parents=True)
        (write_clip if adapter else write_blip2)(output / "eyes")
        settings = {"use_prefix_new_gate": True, "trainable_mode": "mm_stage1"}
        (output / "stage.json").write_text(json.dumps(SMALL_PREFIX | settings))
        name = "mm/llavaVqav2_llamaAdapter" if adapter else "mm/alpacaLlava_llamaQformerv2_13B"
        config = ["--llama_config", output / "stage.json"] if adapter else []
        run = ("--vision_path", output / "eyes", "--max_steps", "1", "--output_dir", output)
        start(name, tiny_base, *config, *run)
        (saved,) = output.glob("epoch*")
        return saved

    return trained


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_script_starts(
    name: str, start: Callable[..., None], tiny_base: Path, intern_lm: Path, request: pytest.FixtureRequest
) -> None:
    """A dry run on its own data with all its values, but on one process; one of those that differ only in numbers."""
    base = intern_lm if name.endswith("internLM") else tiny_base
    if name.startswith("mm/"):
        base = request.getfixturevalue("first_stage")(UPSTREAM[name]["llama_type"] == "llama_adapter")
    alike = [other for other in UPSTREAM if KINDS[other] == KINDS[name]]
    start(name, base, "--dry_run", only_parsed=name != alike[0])
