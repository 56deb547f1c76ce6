"""Whole pretraining runs: every layout trains the same, and goes on in the midst of a file from what it saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory.meta import MetaModel
from accessory.parallel import groups
from tests.conftest import copy_tokenizer
from tests.data.raw.texts import made, written

WORKER = Path(__file__).with_name("pretrain_worker.py")
STEPS = 10
NOISE = 2e-6  # measured: 1e-7
LAYOUTS = {
    "sdp2": (2, ["--data_parallel", "sdp"]),
    "fsdp2": (2, ["--data_parallel", "fsdp"]),
    "tp2_fsdp2": (4, ["--data_parallel", "fsdp", "--model_parallel_size", "2"]),
}
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def place(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a model, and four files to train on and one to evaluate on: a pass has about 6 steps."""
    root = tmp_path_factory.mktemp("pretraining")
    names = ["a.jsonl", "b.jsonl", "c.txt", "validation.jsonl"]
    for number, name in enumerate(names):
        written(root / name, made(6 if number < 3 else 3, number))
    (root / "meta.json").write_text(json.dumps(names))
    settings = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 128}
    (root / "params.json").write_text(json.dumps(settings))
    copy_tokenizer(tiny_base, root)
    return root


def flags_of(place: Path, name: str, data_parallel: int, *more: str) -> list[str]:
    """Of a run of `STEPS` steps of 8 rows of 96 tokens, that saves after every third."""
    return [
        *("--llama_config", str(place / "params.json"), "--tokenizer_path", str(place)),
        *("--data_meta_path", str(place / "meta.json"), "--output_dir", str(place / name), "--device", "cpu"),
        *("--precision", "fp32", "--max_words", "96", "--batch_size", str(4 // data_parallel), "--accum_iter", "2"),
        *("--warmup_iters", "4", "--lr_decay_iters", "40", "--lr", "0.003", "--max_steps", str(STEPS), "--epochs", "9"),
        *("--save_freq", "6", "--eval_steps", "4", "--val_rows", "4", "--num_workers", "1", "--clip_grad", "1"),
        *("--shuffle_buffer", "0.003MB", *more),
    ]


@pytest.fixture(scope="module")
def run(place: Path, python: Callable, torchrun: Callable) -> Callable:
    """(ranks, lists of flags) -> the finished process that trained them one after the other."""

    def start(ranks: int, *jobs: list[str], dies: bool = False):
        file = place / "flags.json"
        file.write_text(json.dumps(jobs))
        done = python(WORKER, file) if ranks == 1 else torchrun(ranks, WORKER, file)
        assert (done.returncode != 0) == dies, done.stdout[-3000:] + done.stderr[-3000:]
        return done

    return start


@pytest.fixture(scope="module")
def whole(place: Path, run: Callable) -> Path:
    """One process that trains to the end; it then trains again, and is killed while it reads step 5's rows."""
    run(1, flags_of(place, "whole", 1), ["kill=5", *flags_of(place, "struck", 1)], dies=True)
    return place / "whole"


def logged(folder: Path, key: str = "loss") -> list[float]:
    """What the log says, after the last step with that number."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [*{entry["step"]: entry[key] for entry in entries if key in entry}.values()]


def test_a_killed_and_a_stopped_run_end_as_their_twin(whole: Path, place: Path, run: Callable) -> None:
    """SIGKILL, then SIGTERM after what was resumed; both in the midst of files, before and behind a pass's end."""
    struck = place / "struck"
    assert sorted(path.name for path in struck.glob("epoch*")) == ["epoch0-iter3", "epoch0-iter4"]
    resume = ["--resume", "latest"]
    done = run(1, ["term=7", *flags_of(place, "struck", 1, *resume)], flags_of(place, "struck", 1, *resume))
    assert f"resuming {struck / 'epoch0-iter4'} after step 4\n" in done.stdout
    assert "Preempted: Stopped by SIGTERM after step 8, which is saved as epoch1-iter" in done.stdout
    assert "not bit for bit" not in done.stdout
    assert logged(struck) == logged(whole) and logged(struck, "val_loss") == logged(whole, "val_loss")
    (last,) = (
        path.name for path in whole.glob("epoch*") if (path / "manifest.json").is_file() and saved_at(path) == STEPS
    )
    one, other = (load_file(folder / last / "model.safetensors") for folder in (whole, struck))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    assert logged(whole)[-1] < logged(whole)[0] - 0.5


def saved_at(checkpoint: Path) -> int:
    """After how many steps."""
    return json.loads((checkpoint / "training_state.json").read_text())["progress"]["total_steps"]


def test_every_layout_trains_as_one_process(whole: Path, place: Path, run: Callable) -> None:
    """And goes on from what one process saved in the midst of a pass."""
    for ranks in (2, 4):
        jobs = [
            flags_of(place, name, min(ranks, 2), *more) for name, (count, more) in LAYOUTS.items() if count == ranks
        ]
        from_one = flags_of(place, "from_one", 2, "--resume", str(whole / "epoch0-iter3"), "--data_parallel", "fsdp")
        run(ranks, *jobs, *([from_one] if ranks == 2 else []))
    expected = logged(whole)
    for name in LAYOUTS:
        assert logged(place / name) == pytest.approx(expected, rel=NOISE), name
        assert logged(place / name, "val_loss") == pytest.approx(logged(whole, "val_loss"), rel=NOISE), name
    assert logged(place / "from_one") == pytest.approx(expected[3:], rel=NOISE)


def test_a_checkpoint_is_a_model(whole: Path) -> None:
    groups.start("cpu")
    model = MetaModel.from_pretrained(whole / "epoch0-iter3", dtype="fp32")
    assert model.generate("0.1 sun", max_gen_len=4, temperature=0.0) is not None
    assert json.loads((whole / "epoch0-iter3" / "config.json").read_text())["max_seq_len"] == 96
