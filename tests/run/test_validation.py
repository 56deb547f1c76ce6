"""An eye on quality while a model is trained: right figures on every layout, and no trace of them in the training."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import transformers

from accessory.checkpoint.manifest import verify
from accessory.checkpoint.run_checkpoints import latest_checkpoint
from accessory.config import FinetuneConfig
from accessory.data.corpus import build_corpus
from accessory.errors import CheckpointError, DataError, OutOfMemoryError, Preempted
from accessory.eval.mmlu import mmlu, read_mmlu
from accessory.export import Destination, merge
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from accessory.parallel import groups
from accessory.run import validation
from accessory.run.report import LOG_FILE, Figures
from accessory.run.status import read_status
from accessory.run.validation_set import read_questions
from accessory.tokenizer import open_tokenizer
from tests.conftest import DATA

WORKER = Path(__file__).with_name("validation_worker.py")
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["--model_parallel_size", "2"]),
    "sdp2": (2, ["--data_parallel", "sdp"]),
    "fsdp2": (2, ["--data_parallel", "fsdp"]),
}
STEPS, HALF = 6, 4
QUESTION = "What is Accessory?"


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, torchrun) -> Path:
    """`runs/LAYOUT/{never,watched,resumed}/`: LoRA with dropout; evaluated never, every other step, and in two halves.

    What is evaluated on are two files of 9 and 4 documents, more than a micro-batch's tokens and an odd number.
    """
    root = tmp_path_factory.mktemp("runs")
    records = json.loads(DATA.read_text())
    for name, some in {"train": records[20:100], "first": records[:9], "second": records[9:13]}.items():
        (root / f"{name}.json").write_text(json.dumps(some))
    questions = [{"subject": ("law", "art")[i % 2], "input": f"{i} is?\nAnswer:", "output": "ABCD"[i % 4]}
                 for i in range(5)]  # fmt: skip
    (root / "mmlu.json").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (root / "val.yaml").write_text("META: [{path: first.json}, {path: second.json, prompt_type: none}]")
    (root / "lora.json").write_text('{"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.2, "bias_tuning": false}')
    for ranks in (1, 2):
        flags = [
            run for layout, (count, _) in LAYOUTS.items() if count == ranks for run in flags_of(layout, root, tiny_base)
        ]
        (root / "flags.json").write_text(json.dumps(flags))
        done = torchrun(ranks, WORKER, root / "flags.json")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return root


def flags_of(layout: str, root: Path, base: Path) -> list[list[str]]:
    """Flags of the four runs on a layout."""
    _, extra = LAYOUTS[layout]
    batch = "2" if layout.endswith("dp2") else "4"
    common = [
        *("--pretrained_path", str(base), "--llama_type", "llama_peft", "--llama_config", str(root / "lora.json")),
        *("--data_config", str(root / "train.json"), "--device", "cpu", "--precision", "fp32", "--max_words", "160"),
        *("--batch_size", batch, "--accum_iter", "2", "--lr", "0.02", "--warmup_epochs", "0.1", *extra),
    ]
    watched = ["--val_data", str(root / "val.yaml"), "--eval_steps", "2", "--sample_prompts", QUESTION]
    watched += ["--sample_tokens", "6", "--mmlu", str(root / "mmlu.json")]
    half, whole = ["--max_steps", str(HALF)], ["--max_steps", str(STEPS)]
    runs = {"never": whole, "watched": [*watched, *whole], "resumed": [*watched, *half]}
    found = [[*common, *more, "--output_dir", str(root / layout / name)] for name, more in runs.items()]
    again = [*watched, *whole, "--resume", "latest"]
    return [*found, [*common, *again, "--output_dir", str(root / layout / "resumed")]]


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / LOG_FILE).read_text().splitlines()]


def evaluations(run: Path) -> list[dict]:
    """Without what differs from run to run."""
    return [{**line, "seconds": 0} for line in log(run) if "val_loss" in line]


def steps(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["grad_norm"]) for line in log(run) if "loss" in line]


def expected(model: Path, root: Path, tokenizer: Path) -> dict[str, tuple[float, float, int]]:
    """By file: mean of -log p, accuracy, supervised tokens; by transformers in float64, a document at a time."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    corpus = build_corpus(root / "val.yaml", open_tokenizer(tokenizer), max_words=160)
    sums: dict[int, list[float]] = {0: [0, 0, 0], 1: [0, 0, 0]}
    for i in range(len(corpus)):
        tokens, labels = (torch.from_numpy(part.astype("int64")) for part in corpus.document(i))
        with torch.no_grad():
            logits = reference(tokens[None]).logits[0]
        rows = labels >= 0
        log_p = logits.log_softmax(-1)[rows].gather(1, labels[rows, None]).sum().item()
        hits = (logits[rows].argmax(-1) == labels[rows]).sum().item()
        source = sums[int(corpus.origins[i, 0])]
        source[:] = [a + b for a, b in zip(source, (-log_p, hits, int(rows.sum())), strict=True)]
    sums[2] = [sum(both) for both in zip(sums[0], sums[1], strict=True)]
    names = ("first.json", "second.json", "all")
    return {name: (loss / n, hits / n, n) for name, (loss, hits, n) in zip(names, sums.values(), strict=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_figures_are_those_of_transformers_in_float64(layout: str, runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    """Before the first step and after the last, over all documents and by file."""
    groups.start("cpu")
    run = runs / layout / "watched"
    first, *_, last = evaluations(run)
    merge(
        [tiny_base, run / f"epoch0-iter{STEPS}"],
        tmp_path / "hf",
        Destination("hf", "fp32"),
        base=None,
        drop_biases=False,
    )
    assert (first["step"], last["step"]) == (0, STEPS) and last["val_loss"] < first["val_loss"] - 0.1
    for line, model in ((first, tiny_base), (last, tmp_path / "hf")):
        for name, (loss, accuracy, supervised) in expected(model, runs, tiny_base).items():
            found = {f"val_{key}": value for key, value in line["val_sources"][name].items()} if name != "all" else line
            assert found["val_supervised"] == supervised
            assert found["val_loss"] == pytest.approx(loss, rel=1e-5)
            assert found["val_perplexity"] == pytest.approx(torch.tensor(loss).double().exp().item(), rel=1e-5 * loss)
            assert found["val_accuracy"] == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mmlu_is_that_of_the_base_before_the_first_step(layout: str, runs: Path, tiny_base: Path) -> None:
    """A number of questions that two ranks do not divide; where the base is sharded, both compute equally often."""
    groups.start("cpu")
    found = mmlu(MetaModel.from_pretrained(tiny_base, dtype="fp32"), read_mmlu(runs / "mmlu.json"))
    first, *_, last = evaluations(runs / layout / "watched")
    assert first["mmlu_accuracy"] == pytest.approx(found.accuracy.value)
    assert first["mmlu_loss"] == pytest.approx(found.loss.value, rel=1e-5)
    assert last["mmlu_loss"] != pytest.approx(found.loss.value, rel=1e-5)
    for subject, figure in found.subjects.items():
        assert first[f"mmlu_accuracy/{subject}"] == pytest.approx(figure.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_does_not_notice(layout: str, runs: Path) -> None:
    """The same losses and gradients, bit for bit and with dropout, as without any evaluation or answer."""
    assert (
        steps(runs / layout / "watched") == steps(runs / layout / "never")
        and len(steps(runs / layout / "never")) == STEPS
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_evaluates_each_time_once(layout: str, runs: Path) -> None:
    """And finds the same to the last digit, answers too."""
    whole, resumed = runs / layout / "watched", runs / layout / "resumed"
    assert evaluations(resumed) == evaluations(whole)
    assert [line["step"] for line in evaluations(whole)] == [0, 2, 4, 6]
    assert steps(resumed) == steps(whole)
    assert [sample["question"] for sample in evaluations(whole)[0]["samples"]] == [QUESTION]
    states = [json.loads((run / f"epoch0-iter{STEPS}" / "training_state.json").read_text())["validation"]
              for run in (whole, resumed)]  # fmt: skip
    assert states[0] == states[1] | {"documents": states[0]["documents"]}


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path):
    """Runs in this process: trains LoRA on 40 records, a fifth of them held out; returns its directory."""
    (tmp_path / "train.json").write_text(json.dumps(json.loads(DATA.read_text())[:40]))
    (tmp_path / "lora.json").write_text('{"lora_rank": 4, "lora_alpha": 8}')

    def given(name: str = "out", **flags) -> Path:
        settings = {
            "pretrained_path": [tiny_base], "llama_type": "llama_peft", "llama_config": [tmp_path / "lora.json"],
            "data_config": tmp_path / "train.json", "output_dir": tmp_path / name, "device": "cpu",
            "precision": "fp32", "max_words": 160, "batch_size": 4, "accum_iter": 1, "epochs": 2, "val_split": 0.2,
            **flags,
        }  # fmt: skip
        finetune(FinetuneConfig(**settings))
        return tmp_path / name

    yield given
    groups.stop()


def losses(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Let evaluations find these losses, one after the other."""
    left = iter(values)
    monkeypatch.setattr(validation, "_figures", lambda sums: Figures(next(left), 0.5, 10))


def test_held_out_records_are_never_trained_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In no epoch; and they are what is evaluated on, before the first step, after each epoch."""
    trained, evaluated = set(), set()
    forward, score = MetaModel.forward, MetaModel.token_scores
    monkeypatch.setattr(
        MetaModel, "forward", lambda model, batch, hits: trained.update(batch.sample_ids) or forward(model, batch, hits)
    )
    monkeypatch.setattr(
        MetaModel,
        "token_scores",
        lambda *given, **more: evaluated.update(given[1].sample_ids) or score(*given, **more),
    )
    out = run()
    assert not trained & evaluated and trained | evaluated == set(range(40)) and 3 < len(evaluated) < 15
    per_epoch = -(-len(trained) // 4)
    assert [line["step"] for line in evaluations(out)] == [0, per_epoch, 2 * per_epoch]
    assert all(line["val_documents"] == len(evaluated) and not line["val_sources"] for line in evaluations(out))


def test_the_best_checkpoint_is_kept_and_linked(run, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """One that was saved for that alone goes when there is a better one; --keep_last spares it."""
    losses(monkeypatch, 9.0, 3.0, 2.0, math.nan, 4.0, 1.0, 5.0, 6.0, 7.0)
    out = run(eval_steps=1, max_steps=8, save_steps=3, keep_last=2, epochs=4)
    kept = sorted(path.name for path in out.iterdir() if path.is_dir() and not path.is_symlink())
    assert kept == ["epoch0", "epoch0-iter5", "epoch0-iter6"]  # epoch0 has 8 steps
    assert (out / "best").readlink() == Path("epoch0-iter5") and verify(out / "best") == 5
    assert read_status(out)["best"] == {"checkpoint": "epoch0-iter5", "step": 5, "loss": 1.0}
    assert "the lowest validation loss, 1.0000, is that after step 5" in capsys.readouterr().out
    assert latest_checkpoint(out)[0].name not in ("best", "epoch0-iter5")
    assert evaluations(out)[3]["val_loss"] is None  # not a number
    MetaModel.from_pretrained(out / "best", dtype="fp32")


def test_without_improvement_it_says_so(run, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    losses(monkeypatch, 1.0, 3.0, 3.0)
    run(eval_steps=2, max_steps=4)
    assert "before the first step it was lower, 1.0000: nothing was learned for these" in capsys.readouterr().out


@pytest.mark.slow
def test_patience_ends_the_run_and_a_resumed_one(run, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Three evaluations in a row without a lower loss, counted over both halves; more patience goes on."""
    losses(monkeypatch, 9.0, 3.0, 2.0, 2.5, 2.0, 2.5)
    out = run(eval_steps=1, max_steps=3, patience=3, save_steps=1)
    assert [line["step"] for line in evaluations(out)] == [0, 1, 2, 3]
    again = {"eval_steps": 1, "save_steps": 1, "resume": Path("latest")}
    assert steps(run(patience=3, **again))[-1][0] == 5
    assert "ended early: 3 evaluations in a row without a lower validation loss; the lowest" in capsys.readouterr().out
    assert (out / "best").readlink() == Path("epoch0-iter2")
    run(patience=3, **again)
    assert "ended early: 3 evaluations" in capsys.readouterr().out and len(steps(out)) == 5
    losses(monkeypatch, 8.0)
    run(patience=4, **again)
    assert [line["step"] for line in evaluations(out)] == [0, 1, 2, 3, 4, 5, 6]


def test_other_documents_are_another_validation(run, tmp_path: Path, capsys) -> None:
    """Their losses say nothing about the ones before; the same ones elsewhere are the same."""
    records = json.loads(DATA.read_text())[50:60]
    for name, some in {"a": records, "b": records[:5], "c": records}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(some))
    given = {"val_split": None, "eval_steps": 2, "save_steps": 1}
    out = run(val_data=tmp_path / "a.json", max_steps=2, **given)
    for name, said, found in (("c", 0, [4]), ("b", 1, [4, 6])):
        capsys.readouterr()
        run(val_data=tmp_path / f"{name}.json", max_steps=found[-1], resume=Path("latest"), **given)
        assert capsys.readouterr().out.count("best loss and patience begin anew") == said
    assert [line["step"] for line in evaluations(out)] == [0, 2, 4, 4, 6]


@pytest.mark.slow
def test_a_signal_cuts_an_evaluation_short(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before is saved; what is resumed from there evaluates first, and ends as a run that was left alone."""
    strike, scores, modes = [0], MetaModel.token_scores, []

    def token_scores(model, batch, **more):
        modes.append(model.training)
        if len(modes) == strike[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return scores(model, batch, **more)

    monkeypatch.setattr(MetaModel, "token_scores", token_scores)
    given = {"eval_steps": 2, "max_steps": 4, "max_tokens": 600}  # an evaluation has micro-batches of so many, too
    whole = run("whole", **given)
    micro_batches = len(modes) // 3
    assert micro_batches > 2 and not any(modes)
    for place, said in ((1, "before the first step; nothing"), (micro_batches + 1, "after step 2, which is saved as")):
        strike[0] = len(modes) + place
        with pytest.raises(Preempted, match=f"Stopped by SIGTERM {said}"):
            run(**given)
        assert len(modes) == strike[0]
    strike[0] = 0
    out = run(resume=Path("latest"), **given)
    assert steps(out) == steps(whole) and evaluations(out) == evaluations(whole)


@pytest.mark.parametrize(("part", "said"), [
    ("token_scores", r"a micro-batch of [\d,]+ tokens in documents of \d+.*needed with .*a smaller --batch_size"),
    ("generate", r"answers to 1 --sample_prompts\. .*needed with fewer --sample_prompts, a smaller --sample_tokens"),
])  # fmt: skip
def test_memory_that_runs_out_is_told(run, monkeypatch: pytest.MonkeyPatch, part: str, said: str) -> None:
    """As in training: when, in what, and which flags would need less."""

    def fail(*_given: object, **_more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(MetaModel, part, fail)
    with pytest.raises(OutOfMemoryError, match=rf"^Evaluation before the first step: out of memory in {said}"):
        run(sample_prompts=[QUESTION], max_steps=1)


def test_a_resumed_run_needs_the_same_split(run) -> None:
    """Else it would train on what it is evaluated on."""
    run(max_steps=2)
    for split in (None, 0.3):
        with pytest.raises(CheckpointError, match=r"val_split was 0\.2, is"):
            run(max_steps=4, val_split=split, resume=Path("latest"))
    run(max_steps=4, val_split=0.3, resume=Path("latest"), allow_changed=["val_split"])


def test_what_cannot_be_evaluated_on_is_refused(run, tmp_path: Path, tiny_base: Path, capsys) -> None:
    """Before any weight is read, with the flag; records that are trained on, too, are counted."""
    (tmp_path / "bad.json").write_text('[{"question": 1}]')
    (tmp_path / "same.json").write_text(json.dumps(json.loads(DATA.read_text())[38:42]))
    with pytest.raises(DataError, match=r"--val_data: .*bad\.json"):
        run(val_split=None, val_data=tmp_path / "bad.json")
    with pytest.raises(DataError, match=r"--val_split 1e-05 holds out none of the 40 records"):
        run(val_split=1e-5)
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("empty.txt", "missing.json", "same.json"):
        with pytest.raises(DataError, match=f"--sample_prompts .*{name}.*a question a line"):
            run(sample_prompts=[str(tmp_path / name)])
    run(val_split=None, val_data=tmp_path / "same.json", dry_run=True)
    out = capsys.readouterr().out
    assert "2 of its records are trained on, too" in out and "validation before the first step: loss" in out


def test_questions_stand_in_flags_and_files(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("one?\n\ntwo?\n")
    (tmp_path / "q.json").write_text('["three\\nlines?"]')
    given = ["zero?", str(tmp_path / "q.txt"), str(tmp_path / "q.json")]
    assert read_questions(given) == ["zero?", "one?", "two?", "three\nlines?"]
