"""Tiny models and data that every test can make, and real processes to run them in."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from accessory.parallel import groups
from tests import cpu_kernels
from tests.here import run_here
from tests.llama_cpp import LlamaCpp, find_library
from tests.support import SupportTable

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data_example" / "accessory_qa.json"
VOCABULARY = 512
SLOWEST = ("test_dockerfile.py", "test_processes.py", "test_finetuning.py", "test_durability.py", "test_resume.py")
"""Files that take minutes: begun first, so that no process is left with one of them when the others have ended."""

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""Widths are multiples of 64 x 2, so that blocks of 64 weights commute with slicing over two ranks."""


def starts_processes(item: pytest.Item) -> bool:
    """Whether it does: by a fixture that is there for that, by its file's `subprocess`, or in Triton's interpreter."""
    if not isinstance(item, pytest.Function) or hasattr(item.module, "subprocess"):
        return True
    return not {"clean_environment", "python", "shell", "torchrun", "llama_cpp"}.isdisjoint(item.fixturenames)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the slowest files first, or leave out what --quick does."""
    if config.getoption("--quick"):
        left_out = [item for item in items if starts_processes(item) or item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    ranks = {name: rank for rank, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Flags of ours."""
    parser.addoption("--quick", action="store_true", help="leave out slow tests and those that start processes")
    parser.addoption("--every-cell", action="store_true", help="run all cells of docs/methods.md's support table")
    parser.addoption(
        "--write-tables", action="store_true", help="write the outcomes of tests into docs/' support tables"
    )


@pytest.fixture(scope="session", autouse=True)
def this_process_goes_on() -> Iterator[None]:
    """What ends its process raises SystemExit in this one: `os._exit` would end pytest, and with success."""

    def leave(status: int = 0) -> NoReturn:
        groups.stop()
        raise SystemExit(status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "end_process", leave)
        yield


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the watch over hanging ranks is told, here where there is one rank only: in, tick, out."""
    told: list[str] = []

    @contextmanager
    def supervised() -> Iterator[None]:
        told.append("in")
        yield
        told.append("out")

    watch = SimpleNamespace(supervised=supervised, tick=lambda: told.append("tick"), leave=lambda: None)
    monkeypatch.setattr(groups, "_watch", watch)
    return told


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Callable:
    """`SupportTable.say`: what a test has shown is what the table in docs/ says, or is written there."""
    return partial(SupportTable.say, write=pytestconfig.getoption("--write-tables"))


@pytest.fixture
def needs_cpu_kernels() -> None:
    """Skipped on a machine that cannot have this CPU's kernels, failed where they do not work."""
    cpu_kernels.require()


@pytest.fixture
def switch_cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Switches them on, as `needs_cpu_kernels`, or off, until the test ends."""

    def switch(on: bool) -> None:
        monkeypatch.setenv("ACCESSORY_AVX512", str(int(on)))
        cpu_kernels.forget()
        if on:
            cpu_kernels.require()

    yield switch
    cpu_kernels.forget()


@pytest.fixture(scope="session")
def strings() -> list[str]:
    """Some 350 texts over which tokenizers disagree: scripts, emoji, code, blanks, spelled control tokens."""
    few = json.loads((ROOT / "tests" / "strings.json").read_text(encoding="utf-8"))
    return [*few, *map("".join, zip(few, few[7:], strict=False)), *map(" ".join, zip(few, few[31:], strict=False))]


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of 512 tokens learned from the quickstart's data: tokenizer.json, tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = json.loads(DATA.read_text())
    tokenizer.train_from_iterator((r["instruction"] + " " + r["output"] for r in records), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def copy_tokenizer(source: Path, directory: Path) -> None:
    """What `write_tokenizer` wrote into `source`."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory)


def small_sentencepiece() -> bytes:
    """A model of a few hundred pieces."""
    model, sentences = io.BytesIO(), ["The quick brown fox jumps over the lazy dog, 1234567890 times!"] * 9
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=320, byte_fallback=True,
        normalization_rule_name="identity", minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def write_model(directory: Path, config: dict) -> None:
    """Random weights of a Hugging Face LLaMA in fp32, larger than usual so that every part matters."""
    generator = torch.Generator().manual_seed(0)
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
        mlp = {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}
        shapes |= {f"{layer}self_attn.{name}.weight": shape for name, shape in attention.items()}
        shapes |= {f"{layer}mlp.{name}.weight": shape for name, shape in mlp.items()}
        shapes |= {f"{layer}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    weights = {
        name: torch.randn(shape, generator=generator) * (0.1 if len(shape) == 2 else 0.2) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    save_file(weights, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: LLaMA of 2 layers and width 128, random fp32 weights, its own tokenizer."""
    directory = tmp_path_factory.mktemp("tiny_base")
    write_model(directory, TINY_CONFIG)
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def lora_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A method's JSON: NormBiasLoRA of rank 4."""
    path = tmp_path_factory.mktemp("config") / "lora.json"
    path.write_text('{"lora_rank": 4, "lora_alpha": 8}')
    return path


def environment() -> dict[str, str]:
    """What child processes see: no rank variables of an outer launcher, one thread each, no hub."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped and not name.startswith("SLURM_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run_python(*arguments: str | Path, cwd: Path = ROOT, timeout: float = 240, **variables: str):
    """Run this Python with `arguments`; returns the finished process with its text output."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment() | variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_ranks(ranks: int, *arguments: str | Path, **options):
    """The same under torchrun with `ranks` processes."""
    return run_python("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *arguments, **options)


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """`environment`."""
    return environment()


@pytest.fixture(scope="session")
def python() -> Callable:
    """`run_python`."""
    return run_python


@pytest.fixture(scope="session")
def shell() -> Callable:
    """Run a line of bash with this Python and its torchrun first on the path."""

    def run(line: str, cwd: Path, timeout: float = 240, **variables: str) -> subprocess.CompletedProcess:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        settings = environment() | variables | {"PATH": path}
        command = ["bash", "-c", line]
        return subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=timeout)

    return run


@pytest.fixture
def called(capsys: pytest.CaptureFixture[str]) -> Callable:
    """(script's path from the root, arguments) -> what a process that ran it would have ended with; in this one."""

    def call(script: str, *arguments: str | Path) -> subprocess.CompletedProcess:
        capsys.readouterr()
        left = run_here(script, *arguments)
        status, said = (1, f"{left}\n") if isinstance(left, str) else (left, "")
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess([script, *map(str, arguments)], status, out, err + said)

    return call


@pytest.fixture(scope="session")
def torchrun() -> Callable:
    """`run_ranks`."""
    return run_ranks


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[LlamaCpp]:
    """llama.cpp itself, to read what we write; where it is not there, the test says so and is skipped."""
    library = find_library()
    if isinstance(library, str):
        pytest.skip(f"llama.cpp cannot be asked: {library}")
    client = LlamaCpp(library)
    yield client
    client.close()
