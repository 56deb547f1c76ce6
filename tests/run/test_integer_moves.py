"""Whole runs that move the integers of a packed base: what moves and why, on all layouts, in one go or in several."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from accessory.checkpoint.opening import open_source
from accessory.config import FinetuneConfig
from accessory.engine import Engine
from accessory.errors import AccessoryError
from accessory.export import Destination, merge
from accessory.finetuning import finetune
from accessory.kernels.codes import whole_numbers
from accessory.meta import MetaModel
from accessory.parallel.groups import Layout
from accessory.quant.groups import group_storage
from accessory.quant.moves import Integers, Moves, best_moves
from accessory.run.integer_moves import IntegerMoves
from tests.conftest import DATA
from tests.runs import LAYOUTS
from tests.test_blueprint import draw
from tests.test_finetuning import WORKER, losses, trained

STEPS = 10
RATES = dict.fromkeys(("lr_2bit", "lr_3bit", "lr_4bit"), 4.0)
MOVING = {"tune": "quantized", "move_every": 2, "galore_update_proj_gap": 3, "galore_rank": 8, "most_moved": 1e-3}
"""Moves many integers of a tiny model in few steps."""
FLAGS = {"quant": True, "quant_type": "int2_g64"}


def config(base: Path, output: Path, settings: dict[str, Any], **more: Any) -> FinetuneConfig:
    """Ten steps of eight records."""
    output.parent.mkdir(parents=True, exist_ok=True)
    (path := output.with_suffix(".json")).write_text(json.dumps(MOVING | RATES | settings))
    flags = FLAGS | {"max_steps": STEPS, "batch_size": 8, "accum_iter": 1, "precision": "fp32"} | more
    return FinetuneConfig(
        pretrained_path=[base], data_config=DATA, output_dir=output, llama_type="llama_qsft", llama_config=[path],
        device="cpu", max_words=160, num_workers=0, lr=2e-3, warmup_epochs=0.0, only_save_trainable=True, clip_grad=0.5,
        **flags,
    )  # fmt: skip


def run(base: Path, output: Path, settings: dict[str, Any] | None = None, **more: Any) -> Path:
    """Where it was trained to."""
    finetune(config(base, output, settings or {}, **more))
    return output


def integers(output: Path) -> dict[str, Tensor]:
    """What was saved of them last."""
    last = max(output.glob("epoch*"), key=lambda path: path.stat().st_mtime)
    return {name: part for name, part in load_file(last / "trainable.safetensors").items() if part.dtype == torch.uint8}


def figures(output: Path) -> dict[str, float]:
    """Of the last step."""
    return json.loads((output / "log.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run in one process."""
    return run(tiny_base, tmp_path_factory.mktemp("moves") / "whole")


@pytest.mark.slow
def test_kept_moves_lower_the_loss(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the documents they are tried on; others are taken back to the bit. Every second proposal is turned around."""
    seen: list[tuple[float, float, int]] = []
    tried: list[float] = []
    move, again = IntegerMoves.move, Engine._loss_again

    def watched(moves: IntegerMoves, optimizer: Any, loss: float, *rest: Any) -> None:
        before = {matrix.name: matrix.weight.codes.clone() for matrix in moves.matrices}
        tried.clear()
        move(moves, optimizer, loss, *rest)
        changed = sum(int((matrix.weight.codes != before[matrix.name]).sum()) for matrix in moves.matrices)
        seen.extend((loss, after, changed) for after in tried)

    def turned(integers: Integers, *rest: Any) -> Moves:
        found = best_moves(integers, *rest)
        numbers = whole_numbers(integers.codes, None, 2, integers.columns)
        number = numbers[torch.arange(len(numbers)), found.column]
        possible = (number - found.by >= 0) & (number - found.by <= 3)
        return found._replace(by=-found.by, gain=found.gain * possible) if len(seen) % 2 else found

    def noted(engine: Engine, *rest: Any) -> float:
        tried.append(again(engine, *rest))
        return tried[-1]

    monkeypatch.setattr(IntegerMoves, "move", watched)
    monkeypatch.setattr(Engine, "_loss_again", noted)
    monkeypatch.setattr("accessory.run.integer_moves.best_moves", turned)
    output = run(tiny_base, tmp_path / "turned")
    assert [(after < before, changed > 0) for before, after, changed in seen] == [(True, True), (False, False)] * 2
    assert 0 < figures(output)["moves_kept"] < figures(output)["moves_proposed"]


@pytest.mark.parametrize("storage", ["int3_g64", "int4_g32"])
def test_every_width_moves(tiny_base: Path, storage: str, tmp_path: Path) -> None:
    """What the log says is what differs from the base."""
    output = run(tiny_base, tmp_path / storage, quant_type=storage)
    kind, differ, count = group_storage(int(storage[3]), int(storage[6:])), 0, 0
    source, saved = open_source(tiny_base), integers(output)
    for name in sorted({name.rpartition(".")[0] for name in saved}):
        shape = source.tensors[name].shape
        began, ended = kind(shape), kind(shape)
        began.pack(source.tensors[name].read())
        ended.adopt({part: value.detach() for part, value in began.named_parameters()} | {
            part: saved[f"{name}.{part}"] for part in ("codes", "high") if f"{name}.{part}" in saved})  # fmt: skip
        differ += int((began.unpack(torch.float32) != ended.unpack(torch.float32)).sum())
        count += began.shape.numel()
    said = figures(output)[f"moved_int{kind.bits}"]
    assert 0 < differ / count <= said < 0.01 and said == figures(output)["moves_kept"] / count


@pytest.mark.slow
def test_the_released_rule_moves_nothing(tiny_base: Path, tmp_path: Path) -> None:
    """At the rates that were published with it; at 10^5 times these it does."""
    diode = {"rule": "diode", "galore_scale": 0.25}
    published = run(tiny_base, tmp_path / "published", diode | dict.fromkeys(RATES, 5e-5))
    assert figures(published)["moves_kept"] == 0
    assert figures(run(tiny_base, tmp_path / "large", diode | dict.fromkeys(RATES, 5.0)))["moves_kept"] > 0


@pytest.mark.slow
def test_accumulated_is_the_same(tiny_base: Path, whole: Path, tmp_path: Path) -> None:
    """Eight micro-batches of one record are one of eight, with the norm clipped."""
    output = run(tiny_base, tmp_path / "eight", batch_size=1, accum_iter=8)
    torch.testing.assert_close(losses(output), losses(whole), rtol=1e-4, atol=0)
    ours, others = integers(output), integers(whole)
    assert figures(whole)["moves_kept"] > 20 and all(torch.equal(ours[name], others[name]) for name in others)


@pytest.mark.slow
def test_moves_are_tried_with_the_teacher(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the loss that is trained: computed again before anything has moved, it is the same."""
    move, seen = IntegerMoves.move, []

    def watched(moves: IntegerMoves, optimizer: Any, loss: float, tokens: float, again: Any) -> None:
        seen.append((loss, again()))
        move(moves, optimizer, loss, tokens, again)

    monkeypatch.setattr(IntegerMoves, "move", watched)
    output = run(tiny_base, tmp_path / "taught", teacher=[Path("base")], teacher_weight=0.5)
    assert all(loss == again for loss, again in seen) and len(seen) == STEPS
    assert figures(output)["moves_kept"] > 0 and figures(output)["divergence"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_resumed_bit_for_bit(tiny_base: Path, optim: str, tmp_path: Path) -> None:
    """Five steps, between two bases and two proposals, and five more: all that is saved is that of ten."""
    found = []
    for stops in ((STEPS,), (5, STEPS)):
        output = tmp_path / str(len(stops))
        for stop in stops:
            run(tiny_base, output, optim=optim, max_steps=stop, resume="latest" if output.is_dir() else None)
        last = max(output.glob("epoch*"), key=lambda path: path.stat().st_mtime)
        found.append([load_file(last / f"{stem}.safetensors") for stem in ("trainable", "training_state")])
    for one, other in zip(*found, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert any(name.endswith(".basis") for name in found[0][1]) and not any("basis" in name for name in found[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["integers", "all"])
def test_what_is_trained_is_loaded_and_merged(tiny_base: Path, tune: str, tmp_path: Path) -> None:
    """As it was trained; `integers` leaves statistics alone, `all` takes everything that is not packed along."""
    output = tmp_path / "out"
    model = finetune(config(tiny_base, output, {"tune": tune, "lr_fp": 1e-3}))
    (part,) = output.glob("epoch*/")
    tokens = torch.arange(40) * 7 % 500
    again = MetaModel.from_pretrained(part, dtype="fp32")
    assert torch.equal(model.eval().logits(tokens, (40,)), again.logits(tokens, (40,)))
    saved = {name.removeprefix("layers.0.") for name in trained(output)}
    assert "attention.wq.weight.codes" in saved and ("attention.wq.weight.scales" in saved) == (tune == "all")
    assert ({"norm.weight", "tok_embeddings.weight", "output.weight"} <= saved) == (tune == "all")
    merge([part], tmp_path / "merged", Destination("accessory", "fp32"), base="packed", drop_biases=False)
    written = open_source(tmp_path / "merged").tensors["layers.0.attention.wq.weight"].read_packed()
    assert torch.equal(written["codes"], integers(output)["layers.0.attention.wq.weight.codes"])
    if tune == "integers":
        again.use(None)
        base = MetaModel.from_pretrained(tiny_base, dtype="fp32", quant_type="int2_g64")
        assert torch.equal(again.logits(tokens, (40,)), base.logits(tokens, (40,)))
        again.use(part)
        assert torch.equal(MetaModel.from_pretrained(tmp_path / "merged", dtype="fp32").logits(tokens, (40,)),
                           again.logits(tokens, (40,)))  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_layout_moves_the_same(tiny_base: Path, whole: Path, ranks: int, tmp_path: Path, torchrun) -> None:
    """As one process does: losses of ten steps, and every integer."""
    names = [name for name, (count, _) in LAYOUTS.items() if count == ranks]
    flags = []
    for name in names:
        own = config(tiny_base, tmp_path / name, {})
        data_parallel = ranks // (2 if name.startswith("tp2") else 1)
        flags.append([
            *("--pretrained_path", str(tiny_base), "--output_dir", str(tmp_path / name), "--device", "cpu"),
            *("--precision", "fp32", "--data_config", str(DATA), "--max_words", "160", "--max_steps", str(STEPS)),
            *("--num_workers", "0", "--lr", "2e-3", "--warmup_epochs", "0", "--clip_grad", "0.5"),
            *("--batch_size", str(8 // data_parallel), "--accum_iter", "1", "--llama_config", str(own.llama_config[0])),
            *("--llama_type", "llama_qsft", "--quant", "--quant_type", "int2_g64", "--only_save_trainable"),
            *LAYOUTS[name][1],
        ])  # fmt: skip
    (tmp_path / "flags.json").write_text(json.dumps(flags))
    done = torchrun(ranks, WORKER, tmp_path / "flags.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    wanted = integers(whole)
    for name in names:
        torch.testing.assert_close(losses(tmp_path / name), losses(whole), rtol=1e-4, atol=0)
        found = integers(tmp_path / name)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted), name
        assert figures(tmp_path / name)["moves_kept"] == figures(whole)["moves_kept"] > 20


def test_refused(tiny_base: Path) -> None:
    """A loop of one's own, and a projection that is cut, before any weight is read."""
    how = {"llama_config": [{"tune": "integers", "galore_proj_type": "right"}], "quant_type": "int2_g64", "train": True}
    with pytest.raises(AccessoryError, match="train=True cannot move integers"):
        MetaModel.from_pretrained(tiny_base, llama_type="llama_qsft", llama_config={"tune": "integers"},
                                  quant_type="int2_g64", train=True)  # fmt: skip
    with pytest.raises(AccessoryError, match="--model_parallel_size 2 cuts the side of a matrix that galore_proj_type"):
        draw(tiny_base, llama_type="llama_qsft", **how).build(Layout(world_size=2, mp_size=2))
