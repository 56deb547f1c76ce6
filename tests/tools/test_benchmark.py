"""tools/benchmark.py: what it measures is what training does, and its formulas are what torch counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode

from accessory import kernels
from accessory.checkpoint.training_state import Progress
from accessory.data.batch import PackedBatch
from accessory.data.corpus import build_corpus
from accessory.parallel import groups
from accessory.quant.four_bit import FourBitWeight
from accessory.tokenizer import open_tokenizer
from tools.benchmarking import ideal, time_shares
from tools.benchmarking.decoding import Run
from tools.benchmarking.training import Training

pytestmark = pytest.mark.slow
aten = torch.ops.aten
DATA = Path(__file__).resolve().parents[2] / "data_example" / "accessory_qa.json"


def test_losses_tokens_and_counts(called: Callable, tiny_base: Path) -> None:
    """Four steps of LoRA in fp32: the first loss is the base's by transformers, the later ones fall."""
    result = trained(
        called, "--model", tiny_base, "--data", DATA, "--steps", "4", "--batch_size", "4", "--rank", "4",
        "--lr", "0.01", "--precision", "fp32", "--max_words", "160",
    )  # fmt: skip
    corpus = build_corpus(DATA, open_tokenizer(tiny_base), max_words=160)
    assert (result["system"], result["method"], result["device"], result["steps"]) == ("accessory", "lora", "cpu", 4)
    assert result["tokens"] == int(corpus.lengths[8:16].sum())  # two steps of four documents warm up
    assert result["tokens_per_s"] == pytest.approx(result["tokens"] / result["seconds"], rel=0.2)
    shapes = [(128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128)]
    assert result["trainable"] == 2 * 4 * sum(wide + high for wide, high in shapes)
    assert result["peak_bytes"] > 100 << 20
    assert len(result["losses"]) == 4
    base = transformers.LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    assert result["losses"][0] == pytest.approx(base_loss(base, corpus, range(4)), abs=2e-4)
    assert result["losses"][3] < result["losses"][0]


def test_prefixes_are_shared_unless_told_not_to_be(called: Callable, tiny_base: Path) -> None:
    """The template's words count once for the documents of a micro-batch; losses are alike to fp32's rounding."""
    flags = "--model", tiny_base, "--data", DATA, "--steps", "3", "--batch_size", "4", "--precision", "fp32"
    shared, apart = trained(called, *flags), trained(called, *flags, "--share_prefixes", "False")
    assert shared["computed_tokens"] < 0.8 * shared["tokens"]
    assert apart["computed_tokens"] == apart["tokens"] == shared["tokens"]
    assert shared["losses"] == pytest.approx(apart["losses"], abs=2e-4)


@torch.no_grad()
def base_loss(model: torch.nn.Module, corpus, documents: range) -> float:
    """Mean over all supervised tokens of `documents` by a model of transformers, one document at a time."""
    total = count = 0.0
    for i in documents:
        tokens, labels = corpus.document(i)
        logits = model(torch.tensor(tokens, dtype=torch.long)[None]).logits[0]
        total += F.cross_entropy(logits, torch.tensor(labels), reduction="sum").item()
        count += (labels >= 0).sum()
    return total / count


def trained(called: Callable, *flags: str | Path) -> dict:
    """What a run in this process ends with."""
    done = called("tools/benchmark.py", "train", "--device", "cpu", "--json", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_second_epoch_from_what_the_base_gave(called: Callable, tiny_base: Path, tmp_path: Path) -> None:
    """Beside the first epoch's figures, which stay what they are without the cache."""
    flags = "--model", tiny_base, "--data", DATA, "--steps", "3", "--batch_size", "4", "--method", "qst", "--quant"
    plain, cached = trained(called, *flags), trained(called, *flags, "--cache_base", tmp_path / "cache")
    assert cached["losses"] == plain["losses"] and "cached_tokens_per_s" not in plain
    corpus = build_corpus(DATA, open_tokenizer(tiny_base), max_words=512)
    states, rest = divmod(cached["cached_bytes"], int(corpus.lengths.sum()) * 128 * 2)
    assert states in (1, 2) and not rest
    assert cached["cached_tokens_per_s"] > 0
    assert (tmp_path / "cache" / "written").read_bytes().count(1) == 12


def test_quantized_in_words(called: Callable, tiny_base: Path) -> None:
    """Without --json a line a number."""
    done = called(
        "tools/benchmark.py", "train", "--model", tiny_base, "--data", DATA, "--steps", "3", "--batch_size", "2",
        "--method", "normbias", "--quant", "--checkpointing", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    shown = {line[:26].strip(): line[26:].strip() for line in done.stdout.splitlines()}
    assert list(shown) == [
        "system", "method", "device", "steps", "tokens", "computed_tokens", "seconds", "tokens_per_s", "peak_bytes",
        "trainable", "losses", "matmul_flops_per_s", "copy_bytes_per_s", "flops_per_token", "packed_bytes_per_token",
        "ideal_tokens_per_s", "ratio_to_ideal", "model_flop_share",
        *(f"time in {category}" for category in time_shares.CATEGORIES),
    ]  # fmt: skip
    biases = 128 + 64 + 64 + 128 + 256 + 256 + 128
    assert int(shown["trainable"]) == 2 * (biases + 2 * 128) + 128
    assert len(json.loads(shown["losses"])) == 3


def test_size_by_name_and_time_shares(called: Callable) -> None:
    """Random NF4 weights, random documents: every category takes time, and nothing is counted twice or left out."""
    result = trained(
        called, "--model", "tiny", "--tokens", "256", "--seq", "64", "--supervised", "0.5", "--steps", "4", "--quant",
        "--optim", "adamw8bit", "--checkpointing", "1",
    )  # fmt: skip
    assert result["tokens"] == 2 * 256
    assert result["losses"][0] == pytest.approx(math.log(512), abs=0.2)
    shares = result["shares"]
    assert tuple(shares) == time_shares.CATEGORIES
    assert sum(shares.values()) == pytest.approx(100, abs=0.1)
    none = set()
    if kernels.computing(torch.device("cpu"), torch.bfloat16) == "avx512":  # which unpacks where it multiplies
        none.add("unpacking")
    assert {category for category in shares if not shares[category]} - {"communication"} == none
    matrices = sum(rows * columns for rows, columns in SHAPES)
    passes = 2 * 2 * matrices - QKV + matrices - W2  # forward and backward of two blocks, one run again to its w2
    read = passes * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert result["packed_bytes_per_token"] == pytest.approx(read / 256, rel=0.01)
    ideal = result["flops_per_token"] / result["matmul_flops_per_s"]
    ideal += result["packed_bytes_per_token"] / result["copy_bytes_per_s"]
    assert result["ideal_tokens_per_s"] == pytest.approx(1 / ideal, rel=0.01)
    assert result["ratio_to_ideal"] == pytest.approx(result["tokens_per_s"] * ideal, rel=0.2)


def test_two_ranks_communicate(torchrun) -> None:
    """Tokens and losses are of both, and the time of what they tell each other is communication's."""
    done = torchrun(
        2, "tools/benchmark.py", "train", "--model", "tiny", "--seq", "32", "--batch_size", "2", "--steps", "3",
        "--method", "full", "--device", "cpu", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result["tokens"] == 2 * 2 * 32
    assert result["trainable"] == 2 * (sum(rows * columns for rows, columns in SHAPES) + 2 * 128) + 2 * 512 * 128 + 128
    assert result["shares"]["communication"] > 1
    assert sum(result["shares"].values()) == pytest.approx(100, abs=0.1)


def test_integers_that_move(called: Callable) -> None:
    """A method that trains more than a checkpoint holds, and moves whole numbers between steps."""
    result = trained(
        called, "--model", "tiny", "--seq", "16", "--batch_size", "2", "--steps", "4", "--method", "qsft_quantized",
        "--quant", "--quant_type", "int2_g64",
    )  # fmt: skip
    assert len(result["losses"]) == 4 and all(map(math.isfinite, result["losses"]))


def test_params_json(called: Callable, tmp_path: Path) -> None:
    """A shape from a file, all of it trained: what an embedding and a head of 300 rows add."""
    (tmp_path / "params.json").write_text(
        '{"dim": 64, "n_layers": 1, "n_heads": 2, "hidden_dim": 96, "vocab_size": 300}'
    )
    result = trained(
        called,
        "--model",
        tmp_path / "params.json",
        "--seq",
        "16",
        "--batch_size",
        "2",
        "--steps",
        "3",
        "--method",
        "full",
    )
    assert result["trainable"] == 2 * 300 * 64 + 4 * 64 * 64 + 3 * 64 * 96 + 3 * 64
    assert result["losses"][0] == pytest.approx(math.log(300), abs=0.2)
    assert result["shares"]["unpacking"] == 0


SHAPES = [(128, 128), (64, 128), (64, 128), (128, 128), (256, 128), (256, 128), (128, 256)]
QKV, W2 = sum(rows * columns for rows, columns in SHAPES[:3]), 128 * 256
"""Of the first block, through which nothing has to go back."""


@pytest.mark.parametrize(("names", "category"), [
    (["aten::mm", "aten::matmul", "_Projection"], "products"),
    (["aten::copy_", "aten::mm", "_ProjectionBackward"], "products"),
    (["aten::bmm", "_AttendByDocumentBackward", "autograd::engine::evaluate_function: X"], "attention"),
    (["aten::mm", "_ChunkedCrossEntropy"], "loss"),
    (["gloo:all_reduce", "c10d::allreduce_", "_ChunkedCrossEntropy"], "communication"),
    (["aten::mul", "benchmark::unpacking", "_Projection"], "unpacking"),
    (["autograd::engine::evaluate_function: _AttendByDocumentBackward"], "attention"),
    (["aten::_fused_adamw_", "Optimizer.step#AdamW.step"], "optimizer"),
    (["aten::silu", "_Gate"], "rest"),
    ([], "rest"),
])  # fmt: skip
def test_category_of(names: list[str], category: str) -> None:
    """The nearest name with an owner decides, and a product that has none is one of the linears."""
    assert time_shares.category_of(names) == category


def test_labels_are_taken_off_again(layout: groups.Layout) -> None:
    """What was labelled for a profiled step is what it was."""
    before = FourBitWeight.unpack_to_buffer, FourBitWeight.unpack, PackedBatch.to
    engine = training(quant_type="nf4").engine(layout)
    time_shares.measure(lambda: engine.step(Progress()), engine)
    assert (FourBitWeight.unpack_to_buffer, FourBitWeight.unpack, PackedBatch.to) == before
    assert "micro_batches" not in vars(engine.order)


@pytest.mark.parametrize("changes", [
    {},
    {"method": "normbias"},
    {"method": "norm", "checkpointing": "all"},
    {"checkpointing": 1, "quant_type": None},
    {"checkpointing": "all", "supervised": 0.1},
    {"method": "full", "quant_type": None},
    {"method": "full", "quant_type": None, "checkpointing": 1},
    {"method": "norm", "quant_type": None, "checkpointing": "all"},
], ids=str)  # fmt: skip
def test_flops_are_those_torch_counts(layout: groups.Layout, changes: dict) -> None:
    """Of one step: products of linears, LoRA and head, forward, backward and again; attention's are bmm's."""
    engine = training(**{"quant_type": "nf4", "precision": "fp32"} | changes).engine(layout)
    engine.model.train()
    in_place = {aten.addmm_: lambda _y, a, b, **_: 2 * a[0] * a[1] * b[1]}  # which torch does not know of
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        report, _ = engine.step(Progress())
    by_operation = counter.get_flop_counts()["Global"]
    counted = sum(by_operation.get(operation, 0) for operation in (aten.mm, aten.addmm, aten.addmm_))
    work = ideal.step_work(engine.model.llma, [48] * 4, 4 * 48, report.supervised, 1)
    seen = 48 * 49 // 2 * 4
    recomputed = sum(block.recompute for block in engine.model.llma.layers)
    heads = 2 * seen * 128  # FLOPs of one of attention's products over all heads of a block
    assert work.attention == 2 * 7 * heads
    assert work.products + work.repeated - 2 * recomputed * heads == pytest.approx(counted, rel=0.005)


def test_pairs_within_a_window() -> None:
    """Each query sees itself and what is before it, no farther than the window."""
    for length, window in ((1, None), (7, None), (7, 3), (7, 20)):
        mask = torch.ones(length, length).tril()
        assert ideal._seen(length, window) == (mask if window is None else mask.triu(1 - window)).sum()


@pytest.fixture
def layout() -> Iterator[groups.Layout]:
    """One process on the CPU."""
    yield groups.start("cpu")
    groups.stop()


def training(**changes) -> Training:
    """Four documents of 48 tokens on one micro-batch of random ones."""
    plain = {
        "model": "tiny", "data": None, "steps": 3, "batch_size": 4, "seq": (48,), "supervised": 0.5, "max_words": 48,
        "method": "lora", "rank": 8, "adapter": None, "quant_type": None, "precision": "bf16", "lr": 1e-3,
        "optim": "adamw", "checkpointing": "none", "share_prefixes": True,
    }  # fmt: skip
    return Training(**plain | changes)


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that peft wrote, with an A and a B that are not zero."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(base, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(directory)
    return directory


def test_adapter_is_what_training_starts_from(called: Callable, tiny_base: Path, adapter: Path) -> None:
    """The first loss is that of peft's own model, scale and all."""
    flags = ["--model", tiny_base, "--data", DATA, "--steps", "3", "--batch_size", "2", "--precision", "fp32",
             "--max_words", "160"]  # fmt: skip
    fresh, laid_over = trained(called, *flags), trained(called, *flags, "--adapter", adapter)
    corpus = build_corpus(DATA, open_tokenizer(tiny_base), max_words=160)
    base = transformers.LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    wanted = base_loss(peft.PeftModel.from_pretrained(base, adapter), corpus, range(2))
    assert laid_over["losses"][0] == pytest.approx(wanted, abs=2e-4)
    assert abs(fresh["losses"][0] - wanted) > 0.05
    assert laid_over["trainable"] == 2 * 4 * sum(rows + columns for rows, columns in SHAPES)


def test_decoding_gives_the_peers_tokens(called: Callable, tiny_base: Path) -> None:
    """Greedy, of the same prompts, in bf16."""
    done = called(
        "tools/benchmark.py", "generate", "--model", tiny_base, "--data", DATA, "--batch_size", "2",
        "--prompt_tokens", "20", "--new_tokens", "6", "--device", "cpu", "--peer", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["equal_tokens"], result["of_tokens"]) == (12, 12)
    assert [len(answer) for answer in result["answers"]] == [6, 6]
    assert not {"seconds", "tokens_per_s", "ms_per_token", "prompt_seconds"} - {
        name.removeprefix("peer_") for name in result if name.startswith("peer_")
    }
    corpus = build_corpus(DATA, open_tokenizer(tiny_base), max_words=1 << 20)
    prompt = torch.tensor(next(corpus.document(i)[0] for i in range(9) if corpus.lengths[i] >= 20)[:20])[None].long()
    peer = transformers.LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    for expected in result["answers"][0]:  # without a cache
        token = peer(prompt).logits[0, -1].argmax()
        assert token == expected
        prompt = torch.cat([prompt, token.view(1, 1)], 1)


def test_decoding_random_weights(called: Callable) -> None:
    """NF4, by the name of a size; the tokens are the same at every run, and bytes those of weights and cache."""
    flags = ["--model", "tiny", "--quant", "--batch_size", "3", "--new_tokens", "4", "--device", "cpu", "--json"]
    runs = [json.loads(called("tools/benchmark.py", "generate", *flags).stdout.splitlines()[-1]) for _ in range(2)]
    assert runs[0]["answers"] == runs[1]["answers"]
    assert [len(answer) for answer in runs[0]["answers"]] == [4, 4, 4]
    matrices = 2 * sum(rows * columns for rows, columns in SHAPES)
    packed = matrices * (1 / 2 + 1 / 64) + 2 * sum(
        4 * (-(-rows * columns // (64 * 256)) + 1) for rows, columns in SHAPES
    )
    head_and_norms, cache = 2 * 512 * 128 + 4 * 5 * 128, 2 * 2 * 2 * 64  # norms are fp32, the rest bf16
    assert runs[0]["read_bytes_per_step"] == packed + head_and_norms + 3 * (32 + 4 // 2) * cache
    fastest = 1000 * runs[0]["read_bytes_per_step"] / runs[0]["copy_bytes_per_s"]
    assert runs[0]["ideal_ms_per_token"] == pytest.approx(fastest, abs=1e-3)


@pytest.mark.parametrize(("answers", "equal"), [
    ([[1, 2, 3], [4, 5, 6]], 6),
    ([[1, 9, 3], [4, 5, 9]], 3),
    ([[9, 2, 3], [9, 5, 6]], 0),
])  # fmt: skip
def test_equal_tokens_are_those_before_the_first_other(answers: list[list[int]], equal: int) -> None:
    """What follows a token that differs answers another question."""
    ours = Run([], answers=[[1, 2, 3], [4, 5, 6]])
    assert ours.equal_tokens(Run([], answers=answers)) == equal


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "2"], "ConfigError: --steps 2: the first 2 are not timed, so more are needed."),
    (["--steps", "200"], "is enough for 19 steps of 8."),
    (["--method", "loar"], "Did you mean 'lora'?"),
    (["--optim", "adam"], "--optim 'adam' is not one of adamw"),
    (["--checkpointing", "some"], "--checkpointing 'some': expected none, all or a number."),
    (["--checkpointing", "3"], "ConfigError: --checkpointing 3: the model has 2 layers."),
    (["--batch_size", "0"], "--batch_size 0: expected a number of 1 or more."),
    (["--tokens", "512"], "--tokens 512: is of random documents"),
    (["--supervised", "0.5"], "--supervised 0.5: is of random documents"),
    (["--lr", "big"], "--lr 'big': expected a number"),
    (["--cache_base", "x"], "--cache_base x: --method lora goes back through the base; expected qst, qst_side, "),
    (["--method", "qst", "--cache_base", "tests"], "--cache_base tests: is there already; give a new directory."),
    (["--cache_base_rows", "int4"], "--cache_base_rows 'int4' is not one of exact, int8"),
])  # fmt: skip
def test_faults_are_one_sentence(called: Callable, tiny_base: Path, flags: list[str], message: str) -> None:
    """Status 1 and no traceback."""
    done = called("tools/benchmark.py", "train", "--model", tiny_base, "--data", DATA, "--device", "cpu", *flags)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("words", "status", "message"), [
    (["trian"], 1, "Did you mean 'train'?"),
    (["train", "--model", "tiny", "--stepz", "4"], 1, "--stepz"),
    (["train", "--model", "tiny", "--data", DATA], 1, "has no tokenizer"),
    (["train", "--model", "tiny", "--tokens", "100", "--seq", "64"], 1, "is no multiple of --seq 64"),
    (["train", "--model", "tiny", "--data", "x.json", "--seq", "64"], 1, "--seq 64: is of random documents"),
    (["train", "--model", "tiny", "--tokens", "64", "--batch_size", "1"], 1, "both say how large a step is"),
    (["train", "--model", "tiny", "--seq", "64,0"], 1, "--seq 0: expected a number of 1 or more."),
    (["train", "--model", "tiny", "--supervised", "2"], 1, "--supervised 2: expected a number above 0, of at most 1."),
    (["generate", "--model", "tiny", "--precision", "bf15"], 1, "Did you mean 'bf16'?"),
    (["train", "--model", "7b"], 1, "nor one of 7B, 13B"),
    (["train", "--model", "tiny", "--method", "full", "--quant"], 1, "nf4 weights cannot be trained"),
    (["train", "--model", "tiny", "--method", "norm", "--rank", "8"], 1, "--rank 8: --method norm has no LoRA"),
    (["generate", "--model", "tiny", "--peer"], 1, "has no weights in a file"),
    (["generate", "--model", "tiny", "--new_tokens", "1"], 1, "--new_tokens 1"),
    (["generate", "--model", "tiny", "--new_token", "4"], 1, "--new_token"),
])  # fmt: skip
def test_mistyped_words_are_refused(called: Callable, words: list, status: int, message: str) -> None:
    """Before anything runs."""
    done = called("tools/benchmark.py", *words)
    assert done.returncode == status
    assert message in done.stderr and not done.stdout


@pytest.mark.parametrize(("flags", "message"), [
    (["--rank", "2"], "has rank 4; leave it out."),
    (["--method", "norm"], ": --method norm has no LoRA; expected normbiaslora or lora."),
])  # fmt: skip
def test_adapters_that_do_not_fit(
    called: Callable, tiny_base: Path, adapter: Path, flags: list[str], message: str
) -> None:
    """Rank and method belong to the adapter."""
    done = called("tools/benchmark.py", "train", "--model", tiny_base, "--adapter", adapter, "--device", "cpu", *flags)
    assert done.returncode == 1
    assert message in done.stderr
