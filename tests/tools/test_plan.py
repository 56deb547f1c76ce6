"""tools/plan.py as a process: what it says fits does, and the flags it names are enough."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, TINY_CONFIG

PLAN = "tools/plan.py"
PARTS = ["weights", "trainable", "gradients", "optimizer", "activations", "logits", "buffers", "working", "total"]


def numbers(said: str) -> dict[str, float]:
    """GB by part, of a printed plan."""
    return {name: float(gb) for name, gb in re.findall(r"^  (\w+) +(\d+\.\d{3}) GB", said, re.MULTILINE)}


@pytest.fixture
def params(tmp_path: Path) -> Path:
    """A params.json as Meta writes them, of a model of 8 blocks."""
    path = tmp_path / "params.json"
    settings = {"dim": 1024, "n_layers": 8, "n_heads": 8, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "trained", "whole"),
    [
        ("normbias", 1_626_112, 6_739_775_488),
        ("lora", 39_976_960, 6_778_392_576),
        ("full", 6_738_415_616, 6_738_415_616),
    ],
)
def test_parameters_of_7b(called: Callable, method: str, trained: int, whole: int) -> None:
    """As published, with the trained ones among them."""
    done = called(PLAN, "7B", "--method", method, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"trainable parameters: {trained:,} of {whole:,}\n")
    assert list(numbers(done.stdout)) == PARTS


def test_weights_of_a_mix(called: Callable, params: Path) -> None:
    """A quarter of the blocks' weights have 4.25 bits, the others 2.5; as many in every block."""
    narrow, mixed = (
        numbers(called(PLAN, str(params), "--quant_type", kind, "--device", "cpu").stdout)["weights"]
        for kind in ("int2_g64", "mix2.5")
    )
    linears = 8 * (4 * 1024**2 + 3 * 1024 * 2816)
    assert mixed - narrow == pytest.approx(linears / 4 * 1.75 / 8 / 1e9, abs=2e-3)


def test_storage_of_each_method(called: Callable) -> None:
    """Where none is stated, one that the method can be trained on; none packs nothing, with methods that allow it."""

    def plan_of(*flags: str) -> str:
        done = called(PLAN, "tiny", "--device", "cpu", *flags)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert plan_of("--method", "qsft") == plan_of("--method", "qsft", "--quant_type", "int2_g64")
    weights = [numbers(plan_of("--method", "qst", *flags))["weights"] for flags in ((), ("--quant_type", "none"))]
    assert weights[0] < weights[1]


def test_a_teacher(called: Callable, params: Path) -> None:
    """Its weights, plain and packed, and its logits beside the student's."""
    alone, *taught = (
        numbers(called(PLAN, str(params), "--device", "cuda", *flags).stdout)
        for flags in ((), ("--teacher", str(params)), ("--teacher", str(params), "--teacher_quant_type", "int8"))
    )
    linears, vocabulary = 8 * (4 * 1024**2 + 3 * 1024 * 2816), 2 * 32000 * 1024
    for plan, width in zip(taught, (2, 1), strict=True):
        assert list(plan) == [*PARTS[:-1], "teacher", "total"]
        assert plan["teacher"] == pytest.approx((width * linears + 2 * vocabulary) / 1e9, abs=2e-3)
        assert plan["logits"] - alone["logits"] > 256 * 32000 * 2 / 1e9
        assert plan["total"] > alone["total"] + plan["teacher"]
    done = called(PLAN, str(params), "--teacher_quant_type", "int8")
    assert done.returncode and "--teacher_quant_type without --teacher" in done.stderr


@pytest.mark.slow
def test_it_fits(called: Callable) -> None:
    """A tenth of the memory is spared, as with --checkpointing auto; the total is compared to the given size."""
    total = numbers(called(PLAN, "7B").stdout)["total"]
    assert "\nIt fits into " in called(PLAN, "7B", "--device_memory", f"{total / 0.89:.3f}").stdout
    assert "\nIt does not fit into " in called(PLAN, "7B", "--device_memory", f"{total / 0.91:.3f}").stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "lora", "--seq", "2048", "--device_memory", "0.6"],
        ["--method", "full", "--optim", "adamw", "--device_memory", "2.5"],
        ["--quant_type", "none", "--method", "normbiaslora", "--seq", "1024", "--batch_size", "8",
         "--device_memory", "1"],
        ["--method", "lora", "--seq", "4096", "--device", "cuda", "--device_memory", "0.15"],
        ["--seq", "256", "--batch_size", "4", "--accum_iter", "2", "--max_tokens", "2048", "--device_memory", "0.4"],
    ],
)  # fmt: skip
def test_named_flags_are_enough(called: Callable, params: Path, flags: list[str]) -> None:
    """Each line of them, given again, fits; and of a number of layers one less does not."""
    said = called(PLAN, params, *flags).stdout
    assert "It does not fit into" in said
    lines = [line.split() for line in said.splitlines() if line.startswith("  --")]
    assert lines
    for line in lines:
        again = called(PLAN, params, *flags, *line)
        assert again.returncode == 0 and "\nIt fits into" in again.stdout, line
        if line[0] == "--checkpointing" and len(line) == 2:
            fewer = called(PLAN, params, *flags, "--checkpointing", str(int(line[1]) - 1))
            assert "\nIt does not fit into" in fewer.stdout


@pytest.mark.slow
def test_together_where_none_is_enough_alone(called: Callable, params: Path) -> None:
    """As few as do it: without any one of them it does not fit."""
    flags = ["--method", "lora", "--seq", "4096", "--device", "cuda", "--device_memory", "0.15"]
    said = called(PLAN, params, *flags).stdout
    assert "These are enough together:" in said
    words = said.splitlines()[-1].split()
    assert words.count("--checkpointing") == 1
    pairs = re.findall(r"--\w+(?: [^-]\S*)?", " ".join(words))
    for pair in pairs:
        fewer = [word for other in pairs if other != pair for word in other.split()]
        assert "\nIt fits into" not in called(PLAN, params, *flags, *fewer).stdout, pair


def test_nothing_is_enough(called: Callable, params: Path) -> None:
    """Then it says what is left with all of them."""
    said = called(PLAN, params, "--device_memory", "0.01", "--device", "cpu").stdout
    assert re.search(r"No flag of this tool is enough: with --\S+ .* a rank takes 0\.\d{3} GB\.$", said.strip())


def test_max_tokens_bounds_a_micro_batch(called: Callable, params: Path) -> None:
    """As many documents as fit into it at a time; more than a step has do not come together."""

    def plan(*flags: str) -> dict[str, float]:
        done = called(PLAN, params, "--seq", "512", *flags)
        assert done.returncode == 0, done.stderr
        return numbers(done.stdout)

    assert plan("--batch_size", "8", "--max_tokens", "1024") == plan("--batch_size", "2", "--accum_iter", "4")
    assert plan("--batch_size", "2", "--max_tokens", "9999") == plan("--batch_size", "2")
    assert plan("--accum_iter", "4", "--max_tokens", "2048") == plan("--batch_size", "4")


def test_fewer_tokens_at_a_time_are_proposed(called: Callable, params: Path) -> None:
    """A step is the same with them, so before anything that changes what is trained."""
    said = called(PLAN, params, "--seq", "512", "--batch_size", "8", "--device_memory", "0.6").stdout
    lines = [line.split() for line in said.splitlines() if line.startswith("  --")]
    flags = [line[0] for line in lines]
    assert flags.index("--max_tokens") < flags.index("--batch_size")
    assert 512 <= int(lines[flags.index("--max_tokens")][1]) < 8 * 512


def test_directories(called: Callable, params: Path, tmp_path: Path) -> None:
    """Hugging Face's config.json and Meta's params.json, the file or its directory: the same plan."""
    whole, directory = called(PLAN, params).stdout, called(PLAN, params.parent).stdout
    assert numbers(whole) == numbers(directory)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(TINY_CONFIG))
    done = called(PLAN, tmp_path / "hf", "--method", "full")
    # Two blocks: q and o of 128 x 128, k and v of 64, three matrices of 256; two norms each; embedding and head.
    blocks = 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + 2 * 128)
    count = blocks + 2 * 512 * 128 + 128
    assert f"trainable parameters: {count:,} of {count:,}" in done.stdout


@pytest.mark.slow
def test_integers_of_an_8b_model_are_trained_in_12_gb(called: Callable, tmp_path: Path) -> None:
    """Llama 3's shape at mix2.2, displacements at rank 64, 512 tokens at once; what docs/low-bit.md says."""
    args = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "hidden_dim": 14336}
    (tmp_path / "params.json").write_text(json.dumps(args))
    flags = ("--method", "qsft_quantized", "--quant_type", "mix2.2", "--seq", "512")
    found = [numbers(called(PLAN, tmp_path / "params.json", *flags, *more).stdout)["total"]
             for more in ((), ("--optim", "adamw8bit"), ("--optim", "adamw8bit", "--checkpointing"))]  # fmt: skip
    said = (ROOT / "docs" / "low-bit.md").read_text()
    assert found[0] < 12 and all(f"{total:.1f} GB" in said for total in found)


def test_bare_checkpointing_is_all(called: Callable) -> None:
    """As in training."""
    bare, all_of_them = (called(PLAN, "7B", "--checkpointing", *value).stdout for value in ([], ["all"]))
    assert bare == all_of_them
    assert numbers(bare)["activations"] < numbers(called(PLAN, "7B").stdout)["activations"] / 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["9B"], "'9B' is none of 7B, 13B, 70B, 1.1B, 135M, tiny, no params.json"),
        (["7B", "--method", "lorra"], "--method 'lorra' is unknown. Did you mean 'lora'?"),
        (["7B", "--quant_type", "nf5"], "--quant_type 'nf5' is unknown. Did you mean 'nf4'?"),
        (["7B", "--optim", "adam8bit"], "--optim 'adam8bit' is unknown. Did you mean 'adamw8bit'?"),
        (["7B", "--method", "full", "--quant_type", "nf4"], "--method full with --quant_type nf4: nf4 weights cannot"),
        (
            ["7B", "--method", "qsft", "--quant_type", "nf4"],
            "--method qsft with --quant_type nf4: it trains integers in groups, their scales and zeros (int2_g64, "
            "int3_g64, mix2.5 and the like), which nf4 has not; give --quant_type int2_g64 or another",
        ),
        (["tiny", "--method", "qsft", "--quant_type", "none"], "--llama_type ..._qsft trains a quantized base"),
        (["tiny", "--method", "adapter", "--vision", "qformerv2"], "--vision qformerv2 with --method adapter, which"),
        (["7B", "--checkpointing", "33"], "--checkpointing 33: expected none, all, or up to 32"),
        (["7B", "--checkpointing", "some"], "--checkpointing 'some': expected none, all, or up to 32"),
        (["7B", "--seq", "0"], "--seq 0: expected a whole number from 1 on."),
        (["7B", "--max_tokens", "100"], "--max_tokens 100: expected a whole number from 512 (--seq) on"),
        (["7B", "--max_tokens"], "--max_tokens True: expected a whole number from 512 (--seq) on"),
        (["7B", "--device_memory", "-1"], "--device_memory -1: expected GB, a number above 0."),
        (["7B", "--device", "gpu"], "--device 'gpu' is not one of auto, cpu, cuda."),
        (["7B", "--offload_inputs", "--device", "cpu"], "--offload_inputs on --device cpu"),
    ],
)
def test_what_cannot_be_is_refused(called: Callable, words: list[str], message: str) -> None:
    """In one line that names the flag."""
    done = called(PLAN, *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"ConfigError: {message}"), done.stderr
    assert done.stderr.count("\n") == 1


def test_mistyped_flag(called: Callable) -> None:
    """Before anything is planned."""
    done = called(PLAN, "7B", "--metod", "lora")
    assert done.returncode == 1 and "trainable parameters" not in done.stdout
    assert done.stderr == "ConfigError: Unknown flag --metod. Did you mean '--method'?\n"
