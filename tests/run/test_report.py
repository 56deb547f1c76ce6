"""What a run shows, read back by the programs that users look at it with."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.image
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from accessory.run import report
from accessory.run.curves import Curves, loss_figure, read_curves, read_losses
from accessory.run.report import (
    CURVE_FILE,
    LOG_FILE,
    Distillation,
    EvaluationReport,
    Figures,
    Reporter,
    StepReport,
    TaskReport,
)
from accessory.run.trackers import make_trackers

REPORT = StepReport(
    step=3,
    epoch=0.3,
    loss=2.5,
    accuracy=0.25,
    lr=1e-3,
    grad_norm=1.25,
    tokens=1000,
    supervised=400,
    seconds=0.5,
    peak_bytes=3 << 30,
    figures={"moved_int2": 0.125},
)


def run(directory: Path | None, losses: list[float], first: int = 0, total: int = 10, enabled: bool = True) -> None:
    """Report `losses` from after step `first` on."""
    trackers = make_trackers(["tensorboard"], directory, first + 1, {}) if directory and enabled else []
    reporter = Reporter(directory, total, first, enabled, trackers)
    for i, loss in enumerate(losses, start=first + 1):
        reporter.step(replace(REPORT, step=i, loss=loss, lr=i / 1000))
    reporter.close()


def scalars(directory: Path, tag: str = "train/loss") -> dict[int, float]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(directory), purge_orphaned_data=True)
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_killed_run_loses_seconds_of_its_curves(tmp_path: Path) -> None:
    """TensorBoard's writer keeps figures for two minutes by default."""
    (tracker,) = make_trackers(["tensorboard"], tmp_path, 0, {})
    assert tracker.writer.flush_secs <= 10
    tracker.close()


def test_line_has_a_fixed_width() -> None:
    """From the first step to the last, for small and large values of everything."""
    reporter = Reporter(None, 100_000, 0, enabled=True)
    lines = [
        reporter.line(replace(REPORT, **changes))
        for changes in (
            {}, {"step": 100_000}, {"loss": 12.0, "grad_norm": 0.001}, {"loss": 123456.7}, {"grad_norm": 1e7},
            {"grad_norm": float("inf")}, {"tokens": 10_000_000, "seconds": 1.0}, {"peak_bytes": 139 << 30},
            {"lr": 0.0}, {"lr": 3e-10}, {"seconds": 100.0, "tokens": 7},
        )
    ]  # fmt: skip
    reporter.started -= 24 * 3600 * 7
    lines += [reporter.line(replace(REPORT, step=step)) for step in (90_000, 99_000, 99_999)]
    reporter.close()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) < 160


def test_line_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """Step, share, loss, rate, norm, speed, memory and time left; printed as it is."""
    reporter = Reporter(None, 4, 1, enabled=True)
    reporter.started -= 7200
    line = reporter.line(REPORT)
    assert line.startswith(
        "step      3/4  75.0% | loss   2.5000 | acc  25.0% | lr 1.00e-03 | grad norm    1.250 |     2000 tok/s"
    )
    assert line.endswith("| peak   3.00 GiB | ETA    1:00:00")  # two steps took two hours, one is left
    reporter.step(REPORT)
    reporter.close()
    assert "loss   2.5000" in capsys.readouterr().out


def test_parts_of_a_loss_with_a_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the line, the log and TensorBoard; the perplexity is that of the labels."""
    trackers = make_trackers(["tensorboard"], tmp_path, None, {})
    reporter = Reporter(tmp_path, 4, 1, enabled=True, trackers=trackers)
    report = replace(REPORT, loss=2.5, distillation=Distillation.of(2.5, cross_entropy=3.0, weight=0.25))
    reporter.step(report)
    reporter.evaluation(replace(EVALUATION, step=3, figures=Figures(2.0, 0.25, 1200, divergence=0.75)))
    reporter.close()
    out = capsys.readouterr().out
    assert "validation after step 3: loss 2.0000 | kl 0.7500 | perplexity 7.389 |" in out
    assert "| loss   2.5000 | ce   3.0000 | kl   1.0000 | acc  25.0% |" in out
    entry, evaluated = (json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines())
    found = (entry["loss"], entry["cross_entropy"], entry["divergence"], entry["perplexity"])
    assert found == (2.5, 3.0, 1.0, math.exp(3.0))
    assert (evaluated["val_loss"], evaluated["val_divergence"]) == (2.0, 0.75)
    assert scalars(tmp_path, "train/divergence") == {REPORT.step: 1.0}
    assert scalars(tmp_path, "val/divergence") == {3: 0.75}


def test_log_and_tensorboard(tmp_path: Path) -> None:
    """Every step with all of its numbers."""
    losses = [3.0, 2.5, 2.25, 2.0]
    run(tmp_path, losses)
    entries = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert [entry["loss"] for entry in entries] == losses
    wanted = asdict(replace(REPORT, step=3, loss=2.25, lr=0.003)) | {"perplexity": math.exp(2.25)}
    del wanted["distillation"]  # there was no teacher
    assert entries[2] == wanted | wanted.pop("figures")
    assert scalars(tmp_path) == dict(enumerate(losses, start=1))
    assert scalars(tmp_path, "train/lr") == pytest.approx({i: i / 1000 for i in range(1, 5)})
    assert scalars(tmp_path, "train/grad_norm")[1] == 1.25
    assert scalars(tmp_path, "train/accuracy")[1] == 0.25
    assert scalars(tmp_path, "train/perplexity")[2] == pytest.approx(math.exp(2.5), rel=1e-6)
    assert scalars(tmp_path, "train/tokens_per_s")[1] == 2000
    assert scalars(tmp_path, "train/peak_gib")[1] == 3
    assert scalars(tmp_path, "train/moved_int2")[1] == 0.125


def test_loss_curve_is_a_picture(tmp_path: Path) -> None:
    """A PNG of a size to look at, with something drawn; another loss gives another picture."""
    run(tmp_path / "a", [3.0, 2.0, 1.0])
    run(tmp_path / "b", [1.0, 2.0, 3.0])
    pictures = [matplotlib.image.imread(tmp_path / name / CURVE_FILE, format="png") for name in "ab"]
    assert all(picture.shape[:2] == (540, 960) for picture in pictures)
    assert all(picture[..., :3].std() > 0.01 for picture in pictures)
    assert (pictures[0] != pictures[1]).any()
    assert 10_000 < (tmp_path / "a" / CURVE_FILE).stat().st_size < 500_000


EVALUATION = EvaluationReport(
    step=2, epoch=0.5, figures=Figures(math.log(8), 0.25, 1200), sources={"a.json": Figures(1.0, 0.5, 200)},
    documents=12, samples=[("two\nlines?", "an *answer*\nof two")], seconds=1.5,
    tasks=(TaskReport("mmlu: accuracy 0.25", {"mmlu_accuracy": 0.25}),),
)  # fmt: skip


def watched(directory: Path, steps: list[int], first: int = 0) -> None:
    """A run of four steps, evaluated after some; the loss is 10 less the step, or half of it in validation."""
    reporter = Reporter(directory, 4, first, True, make_trackers(["tensorboard"], directory, first and first + 1, {}))
    for step in range(first, 5):
        if step > first:
            reporter.step(replace(REPORT, step=step, loss=10.0 - step))
        if step in steps:
            reporter.evaluation(replace(EVALUATION, step=step, figures=Figures((10 - step) / 2, 0.25, 1200)))
    reporter.close()


def test_an_answer_without_words_is_shown_as_nothing() -> None:
    assert replace(EVALUATION, step=0, samples=[("why?", "")]).lines()[-1] == "  answer: [nothing]"


def test_an_evaluation_is_shown_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In lines, in the log, as figures and texts of TensorBoard, in the picture."""
    watched(tmp_path, [0, 2, 4])
    out = capsys.readouterr().out
    assert (
        "validation before the first step: loss 5.0000 | perplexity 148.4 | accuracy 25.0% | 12 documents, 1,200" in out
    )
    assert "  a.json: loss 1.0000 | perplexity 2.718 | accuracy 50.0% | 200 tokens\n  mmlu: accuracy 0.25\n" in out
    assert "  question: two\n    lines?\n  answer: an *answer*\n    of two\n" in out
    lines = [json.loads(line) for line in (tmp_path / LOG_FILE).read_text().splitlines()]
    assert lines[3] == {
        "step": 2, "epoch": 0.5, "val_loss": 4.0, "val_perplexity": math.exp(4), "val_accuracy": 0.25,
        "mmlu_accuracy": 0.25, "val_supervised": 1200, "val_documents": 12, "seconds": 1.5,
        "val_sources": {"a.json": {"loss": 1.0, "perplexity": math.e, "accuracy": 0.5, "supervised": 200}},
        "samples": [{"question": "two\nlines?", "answer": "an *answer*\nof two"}],
    }  # fmt: skip
    assert scalars(tmp_path, "val/loss") == {0: 5.0, 2: 4.0, 4: 3.0}
    assert scalars(tmp_path, "val/mmlu_accuracy") == {0: 0.25, 2: 0.25, 4: 0.25}
    assert scalars(tmp_path, "val/accuracy/a.json") == {0: 0.5, 2: 0.5, 4: 0.5}
    events = EventAccumulator(str(tmp_path)).Reload()
    (text,) = events.Tensors("samples/0/text_summary")[1].tensor_proto.string_val
    assert text.decode() == "    two\n    lines?\n\n&nbsp;\n\n    an *answer*\n    of two"
    axes = loss_figure(read_curves(tmp_path / LOG_FILE)).axes[0]
    assert [line.get_label() for line in axes.lines] == ["training", "validation"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "validation"]


def test_evaluations_of_a_resumed_run_replace_later_ones(tmp_path: Path) -> None:
    """One after the step that it goes on from stays; one that is made again counts once; a fresh run shows itself."""
    watched(tmp_path, [0, 2, 4])
    watched(tmp_path, [2, 3], first=2)
    curves = read_curves(tmp_path / LOG_FILE)
    assert curves.training == {1: 9.0, 2: 8.0, 3: 7.0, 4: 6.0}
    assert curves.validation == {0: 5.0, 2: 4.0, 3: 3.5}
    watched(tmp_path, [0])
    assert read_curves(tmp_path / LOG_FILE).validation == scalars(tmp_path, "val/loss") == {0: 5.0}


def test_a_loss_beyond_bounds_has_no_perplexity() -> None:
    assert Figures(800.0, 0.0, 1).as_json() == {"loss": 800.0, "perplexity": None, "accuracy": 0.0, "supervised": 1}
    assert Figures(math.nan, math.nan, 0).as_json()["loss"] is None


@pytest.mark.slow
def test_wandb_gets_it_all_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into its own directory in --output_dir, as wandb reads it back."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    reporter = Reporter(tmp_path, 4, 0, True, make_trackers(["wandb"], tmp_path, 0, {"lr": 0.5}))
    reporter.evaluation(replace(EVALUATION, step=0))
    reporter.step(replace(REPORT, step=1, loss=2.0))
    reporter.close()
    assert wandb.run is None and not list(tmp_path.glob("events*"))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for name in (b"train/loss", b"val/perplexity", b"val/loss/a.json", b"samples", b"lr"):
        assert name in content, name


def test_resumed_run_replaces_what_came_after(tmp_path: Path) -> None:
    """Steps 4 to 6 of the first run no longer count once a second one went on from step 3, in log and TensorBoard."""
    run(tmp_path, [6.0, 5.0, 4.0, 9.0, 9.0, 9.0])
    run(tmp_path, [3.0, 2.0], first=3)
    expected = {1: 6.0, 2: 5.0, 3: 4.0, 4: 3.0, 5: 2.0}
    assert read_losses(tmp_path / LOG_FILE) == expected
    assert list(read_losses(tmp_path / LOG_FILE)) == sorted(expected)
    assert scalars(tmp_path) == expected
    assert len((tmp_path / LOG_FILE).read_text().splitlines()) == 8  # nothing is taken out of the log itself
    seconds = [path.name.split(".")[3] for path in tmp_path.glob("events.out.tfevents.*")]
    assert len(set(seconds)) == 2  # in one and the same second, the files' order would be chance


def test_fresh_run_in_a_used_directory(tmp_path: Path) -> None:
    """Shows itself only."""
    run(tmp_path, [6.0, 5.0, 4.0])
    run(tmp_path, [3.0, 2.0])
    assert read_losses(tmp_path / LOG_FILE) == scalars(tmp_path) == {1: 3.0, 2: 2.0}


def test_log_of_a_killed_run(tmp_path: Path) -> None:
    """An unfinished line is passed over, and the next run's is not spoilt by it."""
    run(tmp_path, [6.0, 5.0])
    with (tmp_path / LOG_FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    run(tmp_path, [4.0, 3.0], first=2)
    assert read_losses(tmp_path / LOG_FILE) == {1: 6.0, 2: 5.0, 3: 4.0, 4: 3.0}


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They print and write nothing."""
    run(tmp_path, [1.0, 2.0], enabled=False)
    reporter = Reporter(tmp_path, 1, 0, enabled=False)
    reporter.say("hello")
    reporter.close()
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither events nor log."""
    monkeypatch.chdir(tmp_path)
    run(None, [1.0])
    assert list(tmp_path.iterdir()) == []


def test_run_without_a_step(tmp_path: Path) -> None:
    """A run that was over before it began closes all the same."""
    run(tmp_path, [])
    assert not (tmp_path / CURVE_FILE).exists()


def test_peak_memory_counts_this_process(python) -> None:
    """It grows by what is really touched; in a process of its own, for it never falls again."""
    lines = [
        "import torch",
        "from accessory.run.report import peak_memory",
        "before = peak_memory(torch.device('cpu'))",
        "block = torch.ones(200 << 18)",  # 200 MiB
        "print(before, peak_memory(torch.device('cpu')), block.nbytes)",
    ]
    done = python("-c", "\n".join(lines))
    before, after, size = map(int, done.stdout.split())
    assert before < after and after > size


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ImportError("failed to map segment"), "cannot be written (ImportError: failed to map segment)"),
        (OSError(28, "No space left on device"), "cannot be written (No space left on device)"),
    ],
)
def test_a_curve_that_cannot_be_drawn_hides_no_other_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, error: Exception, said: str
) -> None:
    """When memory has run out, so that not even the library that draws can be loaded: it is said, and that is all."""

    def fail(_losses: dict[int, float]) -> None:
        raise error

    monkeypatch.setattr(report, "loss_figure", fail)
    reporter = Reporter(tmp_path, 3, 0, enabled=True)
    (tmp_path / LOG_FILE).write_text("")
    reporter.close()
    assert said in "".join(capsys.readouterr())


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 76])
def test_steps_are_marked_by_whole_numbers(steps: int) -> None:
    """There is no step 1.25."""
    axes = loss_figure(Curves({step: 1 / step for step in range(1, steps + 1)}, {})).axes[0]
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks), ticks
