"""accessory/quantizer/job.py: what is written, stopping and going on, and faults."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from accessory.checkpoint.lazy import HeldTensor, PackedTensor
from accessory.checkpoint.opening import open_source
from accessory.errors import CheckpointError, ConfigError
from accessory.export import Destination, calibrated, open_base
from accessory.kernels.codes import whole_numbers
from accessory.parallel import groups
from accessory.quant.packed import frozen
from accessory.quantizer.blocks import Blocks, linears
from accessory.quantizer.calibration import calibration_rows
from accessory.quantizer.gptq import curvature, damp_, gptq
from accessory.quantizer.settings import HELD, Settings

SETTINGS = Settings("mix2.5", rows=6, own_rows=2, row_tokens=32, batch=2, distill_steps=3, distill_batch=4)


class Stopped(Exception):
    """In the place of a signal."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, strings: list[str]) -> Path:
    """Calibration text: a record a line."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(strings * 3), encoding="utf-8")
    return path


def run(base: Path, target: Path, text: Path, settings: Settings = SETTINGS, **more) -> dict:
    model, _ = open_base([base])
    destination, say = Destination(more.get("to", "accessory"), "fp32"), more.get("say", lambda _: None)
    return calibrated(model, base, target, text, settings, destination, groups.start("cpu"), say)


@pytest.fixture(scope="module")
def finished(tiny_base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """(directory, figures) of a quantization that nothing stopped."""
    target = tmp_path_factory.mktemp("finished") / "out"
    return target, run(tiny_base, target, text)


def test_what_is_written(finished: tuple[Path, dict], tiny_base: Path) -> None:
    """A packed base: linears of two and four bits, all else as it was; and nothing is left beside it."""
    target, figures = finished
    source, base = open_source(target), open_source(tiny_base)
    packed = {name: tensor for name, tensor in source.tensors.items() if isinstance(tensor, PackedTensor)}
    assert len(packed) == 14 and {tensor.storage.name for tensor in packed.values()} == {"int2_g64", "int4_g128"}
    wide = sum(t.shape[0] * t.shape[1] for t in packed.values() if t.storage.bits == 4)
    assert 0.1 < wide / sum(t.shape[0] * t.shape[1] for t in packed.values()) <= 0.25
    norm = "layers.1.ffn_norm.weight"
    assert torch.equal(source.tensors[norm].read(), base.tensors[norm].read())
    assert (target / "quant_strategy.json").is_file() and [p.name for p in target.parent.iterdir()] == ["out"]
    assert 2.5 < figures["bits"] < 3 and len(figures["blocks"]) == 2 and len(figures["divergences"]) == 3
    assert 0 < figures["perplexity_full"] < figures["perplexity_blocks"] * 1.5


def test_every_linear_is_near_its_own(finished: tuple[Path, dict], tiny_base: Path) -> None:
    """Random weights have no structure to lose: at two bits about a tenth of their variance is gone."""
    source, base = open_source(finished[0]), open_source(tiny_base)
    for name, tensor in source.tensors.items():
        if isinstance(tensor, PackedTensor):
            wanted = base.tensors[name].read().float()
            lost = (tensor.read() - wanted).square().mean() / wanted.square().mean()
            assert lost < (0.3 if tensor.storage.bits == 2 else 0.03), name


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", ["own text", "sensitivity of block   1", "block   1", "last pass"])
def test_stopped_and_started_again(
    stop_at: str, finished: tuple[Path, dict], tiny_base: Path, text: Path, tmp_path: Path
) -> None:
    """Wherever it was stopped, the result is the same bit for bit, and finished blocks are not computed again."""
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith(stop_at):
            raise Stopped

    target = tmp_path / "out"
    with pytest.raises(Stopped):
        run(tiny_base, target, text, say=say)
    assert not target.exists() and (tmp_path / ".out.quantizing").is_dir()
    blocks = {path.name: load_file(path) for path in (tmp_path / ".out.quantizing").glob("block-*")}
    again: list[str] = []
    run(tiny_base, target, text, say=again.append)
    assert sum(line.startswith("block") for line in lines[:-1] + again) <= 2
    ours, theirs = (load_file(path / "model.safetensors") for path in (target, finished[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    changed = [name for block in blocks.values() for name in block if not torch.equal(ours[name], block[name])]
    assert bool(changed) == bool(blocks) and not any(name.endswith("codes") for name in changed)  # by the last pass


def test_another_quantization_in_the_folder(tiny_base: Path, text: Path, tmp_path: Path) -> None:
    """What differs is said; nothing is overwritten."""

    def say(line: str) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(tiny_base, tmp_path / "out", text, say=say)
    with pytest.raises(CheckpointError, match=r"holds a quantization with other epochs 1, now 2\. Give the same flags"):
        run(tiny_base, tmp_path / "out", text, replace(SETTINGS, epochs=2))


def test_two_at_work_for_one_target(tiny_base: Path, text: Path, tmp_path: Path) -> None:
    """The second is refused with who is at work there; the first goes on."""

    def say(line: str) -> None:
        if line.startswith("block   1"):
            with pytest.raises(
                ConfigError, match=rf"TARGET .*quantizing: a run is at work there: process {os.getpid()} "
            ):
                run(tiny_base, tmp_path / "out", text)

    run(tiny_base, tmp_path / "out", text, say=say)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": 0}, "--rows 0: expected a whole number of at least 1"),
        ({"batch": 16}, r"--batch 16: there are 8 rows \(--rows, --own_rows\)"),
        ({"quant_type": "int5_g64"}, "--quant_type 'int5_g64' cannot be calibrated"),
    ],
)
def test_faults_are_told_before_anything_is_read(changed: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SETTINGS, **changed).check(1)


def test_ranks_divide_the_rows() -> None:
    with pytest.raises(ConfigError, match="--own_rows 2: expected a multiple of the 4 processes"):
        replace(SETTINGS, rows=4).check(4)


def test_gptq_alone(tiny_base: Path, text: Path, tmp_path: Path) -> None:
    """Without epochs and last pass nothing is trained, and all linears have the one width.

    The second block is fitted to what the first one gives packed, on the rows that are not held out.
    """
    settings = replace(SETTINGS, quant_type="int3_g64", rows=8, own_rows=0, epochs=0, distill_steps=0)
    figures = run(tiny_base, tmp_path / "out", text, settings)
    assert figures["bits"] == pytest.approx(3.5) and figures["perplexity"] == figures["perplexity_blocks"]
    source, (model, _) = open_source(tmp_path / "out"), open_base([tiny_base])
    assert source.storage == "int3_g64"
    blocks = Blocks(model.args, model.tensors, torch.bfloat16, groups.start("cpu"))
    ids = calibration_rows(text, model.tokenizer, settings.row_tokens, settings.rows + HELD)[: settings.rows]
    where = blocks.sequences(*ids.shape)
    for packed in (True, False):
        block = blocks.load(0)
        for name, linear in linears(block).items() if packed else ():
            linear.weight = frozen(source.tensors[f"layers.0.{name}.weight"].read().bfloat16())
        with torch.no_grad():
            x = blocks.load(1).attention_norm(block(blocks.decoder.enter(ids.flatten(), where), where)).float()
        name = "layers.1.attention.wq.weight"
        grid, _ = gptq(model.tensors[name].read().bfloat16(), curvature(damp_(x.t() @ x)), 3, 64)
        parts = {part: value.read() for part, value in source.tensors[name].parts.items()}
        codes = whole_numbers(parts["codes"], parts["high"], 3, x.shape[1])
        assert ((grid.rounded().codes == codes).float().mean() > 0.97) == packed


def test_a_target_that_is_there(tiny_base: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="expected a new or empty directory"):
        run(tiny_base, tmp_path, text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "quant_type", "bits"), [("gptq", "int3_g64", 3), ("awq", "mix2.5", 4), ("gptq", "mix2.5", 2)]
)
def test_whole_points_for_others_files(
    tiny_base: Path, text: Path, tmp_path: Path, to: str, quant_type: str, bits: int
) -> None:
    """Integers and points of the files are those that were fitted, to the bit, also after a stop; scales are trained
    on by the last pass. AWQ's files hold all in four bits.
    """
    settings, lines, kept = replace(SETTINGS, quant_type=quant_type), [], {}

    def say(line: str) -> None:
        lines.append(line)
        if line.startswith("last pass"):
            raise Stopped

    with pytest.raises(Stopped):
        run(tiny_base, tmp_path / "out", text, settings, say=say, to=to)
    assert lines[0].startswith(f"--to {to}: zero points are whole")
    for path in (tmp_path / ".out.quantizing").glob("block-*"):
        kept |= load_file(path)
    figures = run(tiny_base, tmp_path / "out", text, settings, to=to)
    assert figures["perplexity"] < 1.5 * figures["perplexity_full"]
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stated["quant_method"], stated["bits"]) == (to, bits)
    assert ("dynamic" in stated) == (to == "gptq" and quant_type == "mix2.5")
    packed = {name: tensor for name, tensor in open_source(tmp_path / "out").tensors.items()
              if isinstance(tensor, PackedTensor)}  # fmt: skip
    assert len(packed) == 14
    for name, tensor in packed.items():
        found, (codes, high, scales, points) = tensor.read_matrix().as_codes(), of_block(kept, name)
        columns, narrower = tensor.shape[1], found.scales.shape[1] // scales.shape[1]  # groups of the file
        numbers = whole_numbers(found.codes, found.high, found.bits, columns)
        own_bits = 3 if high is not None else 8 * codes.shape[1] // columns
        assert torch.equal(numbers, whole_numbers(codes, high, own_bits, columns)), name
        assert torch.equal(found.points, points.repeat_interleave(narrower, 1)), name
        scales = scales.repeat_interleave(narrower, 1)
        assert not torch.equal(found.scales, scales)
        torch.testing.assert_close(found.scales, scales, rtol=0.3, atol=1e-3)


def of_block(kept: dict[str, torch.Tensor], name: str) -> list[torch.Tensor | None]:
    """The parts of a matrix in a finished block's file."""
    return [kept.get(f"{name}.{part}") for part in ("codes", "high", "scales", "points")]


def test_a_format_that_cannot_hold_it_is_told_at_once(tiny_base: Path, text: Path, tmp_path: Path) -> None:
    """Before anything is computed: words of GPTQ's files hold whole rows."""
    model, _ = open_base([tiny_base])
    name = "layers.1.feed_forward.w2.weight"
    odd = replace(model, tensors=model.tensors | {name: HeldTensor(torch.zeros(127, 256))})
    with pytest.raises(CheckpointError, match=r"mlp.down_proj.weight has shape \[127, 256\]; GPTQ's words expect mult"):
        Destination("gptq").check_calibrated(odd, tmp_path / "out", "mix2.5")
    with pytest.raises(ConfigError, match="--to greenbit: with --calibrate it is accessory, gptq or awq"):
        run(tiny_base, tmp_path / "out", text, to="greenbit")
    assert not list(tmp_path.iterdir())
