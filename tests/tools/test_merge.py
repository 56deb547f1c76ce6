"""tools/merge.py as a process."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from accessory.export import Destination, open_whole
from accessory.meta import MetaModel
from accessory.tokenizer import open_tokenizer
from tests.checkpoint.trained import write_trained
from tests.conftest import small_sentencepiece

NEW = ["<one>", "<two>"]
TOKENS = torch.arange(40) * 7 % 500


@pytest.fixture(scope="module")
def part(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the tiny model in NF4."""
    return write_trained(tiny_base, tmp_path_factory.mktemp("trained") / "part", "nf4")


def test_merged_model_and_its_error(python, part: Path, tmp_path: Path) -> None:
    """What was trained on is merged into; the second line says that what was written is what was trained."""
    target = tmp_path / "out"
    arguments = ("--to", "hf", "--dtype", "fp32", "--precision", "fp32")
    done = python("tools/merge.py", part, target, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    assert first == f"{part} -> {target} (hf, base dequantized)"
    found = re.fullmatch(
        r"against the model as trained: logits differ by (\S+) at most and (\S+) on average over (\d+) probe tokens; "
        r"the likeliest next token is another at 0 of them",
        second,
    )
    assert found and float(found[1]) < 1e-3 and float(found[2]) < 1e-4 and int(found[3]) > 100
    expected = MetaModel.from_pretrained(part, dtype="fp32").logits(TOKENS, (40,))
    model = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    with torch.no_grad():
        assert (model(TOKENS[None]).logits[0] - expected).abs().max() < 1e-4


def test_how_to_ask_goes_along(called, tiny_base: Path, tmp_path: Path) -> None:
    """Our own format states the layout of questions, by which the demo asks; for others the tool prints it."""
    part = write_trained(tiny_base, tmp_path / "part")
    run = json.loads((part / "run.json").read_text())
    hint = "trained on questions laid out as dialog: ask it with --system_prompt dialog, after the system's words 'Hi.'"
    for layout, system, said in (("dialog", "Hi.", [hint]), ("alpaca", None, [])):
        (part / "run.json").write_text(json.dumps(run | {"prompt_layouts": {layout: 3, "qg": 1}, "system": system}))
        for to, printed in (("hf", said), ("accessory", [])):
            done = called("tools/merge.py", part, tmp_path / to / layout, "--to", to)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.splitlines()[2:] == printed
        written = open_whole([tmp_path / "accessory" / layout])[0]
        assert written.prompt_layouts == (layout, "qg")
        Destination().write(written, tmp_path / "again" / layout)
        model = MetaModel.from_pretrained(tmp_path / "again" / layout)
        assert (model.prompt_layout, model.system) == (layout, system)


def test_how_to_ask_depends_on_the_chat_template(called, tiny_base: Path, tmp_path: Path) -> None:
    """A model with a template is asked by it, unless it is told otherwise: a part trained on alpaca needs the hint."""
    part = write_trained(tiny_base, tmp_path / "part")
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (part / "chat_template.jinja").write_text(template)
    run = json.loads((part / "run.json").read_text())
    hint = "trained on questions laid out as alpaca: ask it with --system_prompt alpaca"
    for layout, printed in (("chat", []), ("alpaca", [hint])):
        (part / "run.json").write_text(json.dumps(run | {"prompt_layouts": {layout: 3}}))
        for to, target in (("hf", tmp_path / layout), ("gguf", tmp_path / f"{layout}.gguf")):
            done = called("tools/merge.py", part, target, "--to", to)
            assert done.returncode == 0, done.stderr[-3000:]
            assert [line for line in done.stdout.splitlines() if line.startswith("trained on")] == printed


def test_full_base_is_further_away(called, tiny_base: Path, part: Path, tmp_path: Path) -> None:
    """Asked for, it is added to the weights in full precision, which training did not see; BASE TRAINED is taken."""
    target = tmp_path / "out.gguf"
    arguments = ("--to", "gguf", "--base", "full", "--probe", "What is this?")
    done = called("tools/merge.py", tiny_base, part, target, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = done.stdout.splitlines()
    assert first == f"{tiny_base} + {part} -> {target} (gguf, base full)"
    assert 0.05 < float(re.search(r"differ by (\S+)", second)[1]) < 3
    assert target.is_file()


def test_user_error(python, part: Path, tmp_path: Path) -> None:
    """One line, status 1, nothing written; so is every other, without a process of its own."""
    done = python("tools/merge.py", part, tmp_path / "out", "--to", "meta")
    check_refusal(done, "CheckpointError: A params.json of meta cannot express this model's qkv_bias True", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--to", "gguff"), "ConfigError: --to 'gguff' is unknown. Did you mean 'gguf'?"),
        (("--dtype", "fp33"), "ConfigError: --dtype 'fp33' is unknown. Did you mean 'fp32'?"),
        (("--precision", "bf61"), "ConfigError: --precision 'bf61' is unknown. Did you mean 'bf16'?"),
        (("--base", "half"), "ConfigError: --base 'half' is neither full, dequantized nor packed."),
    ],
)
def test_user_errors(called, part: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    """The nearest is named."""
    check_refusal(called("tools/merge.py", part, tmp_path / "out", *arguments), message, tmp_path)


def test_no_target(called, part: Path) -> None:
    """A single path could be the source or the target: it is refused."""
    done = called("tools/merge.py", part)
    assert done.returncode == 1
    assert done.stderr == f"ConfigError: Found {part}; expected SOURCE [SOURCE ...] TARGET.\n"


def check_refusal(done: subprocess.CompletedProcess, message: str, directory: Path) -> None:
    """One line that begins with `message`, status 1, an empty directory."""
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not list(directory.iterdir())


def test_help(called) -> None:
    """Every argument with what it does."""
    done = called("tools/merge.py", "--help")
    assert done.returncode == 0
    text = done.stdout + done.stderr
    for word in ("PATHS", "TARGET", "--to", "--base", "--dtype", "--drop_biases", "--probe", "--precision"):
        assert word in text, word
    assert "leave out the biases that training added" in text


def test_the_tokenizer_given_is_written_with_the_tokens_of_training(
    called, tiny_base: Path, tmp_path: Path, strings: list[str]
) -> None:
    """A part of a run with --new_tokens, with the base's own tokenizer.json and .model; settings are taken, too."""
    part = write_trained(tiny_base, tmp_path / "part", vocabulary_tuning=True)
    tensors = load_file(part / "trainable.safetensors")
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:2]])
    save_file(tensors, part / "trainable.safetensors")
    for name, change in (("config.json", {"vocab_size": 514}), ("run.json", {"arguments": {"new_tokens": NEW}})):
        (part / name).write_text(json.dumps(json.loads((part / name).read_text()) | change))
    trained = open_tokenizer(tiny_base).with_added_tokens(NEW)
    trained.save(part)
    given = Path(shutil.copytree(tiny_base, tmp_path / "given", ignore=shutil.ignore_patterns("*.safetensors")))
    (given / "tokenizer.model").write_bytes(small_sentencepiece())
    (tmp_path / "longer.json").write_text('{"max_seq_len": 600}')
    arguments = ("--tokenizer_path", given, "--llama_config", tmp_path / "longer.json", "--dtype", "fp32")
    done = called("tools/merge.py", part, tmp_path / "out", *arguments, "--precision", "fp32")
    assert done.returncode == 0 and "another at 0 of them" in done.stdout, done.stderr[-3000:]
    assert (tmp_path / "out/tokenizer.model").read_bytes() == small_sentencepiece()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", split_special_tokens=True)
    assert theirs.convert_tokens_to_ids(NEW) == [512, 513]
    assert [theirs(text).input_ids for text in strings] == [[0, *trained.encode(text)] for text in strings]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").max_position_embeddings == 600
