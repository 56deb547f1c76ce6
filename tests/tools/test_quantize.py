"""tools/quantize.py as a process: packing once instead of at every start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from accessory.checkpoint.lazy import PackedTensor
from accessory.checkpoint.opening import open_source
from accessory.export import Destination, calibrated, open_base
from accessory.kernels.codes import whole_numbers
from accessory.meta import MetaModel
from accessory.parallel import groups
from accessory.quantizer.settings import Settings
from tests.checkpoint.trained import write_trained

TOKENS = torch.arange(40) * 7 % 500


def test_packed_base(python, called, tiny_base: Path, tmp_path: Path) -> None:
    """What is written loads without a flag as what packing at load gives; packing it again is refused."""
    target = tmp_path / "packed"
    done = python("tools/quantize.py", tiny_base, target, "--quant_type", "nf4_single", "--dtype", "fp32")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"{tiny_base} -> {target} (nf4_single, accessory)\n"
    assert open_source(target).storage == "nf4_single"
    found = MetaModel.from_pretrained(target, dtype="fp32").logits(TOKENS, (40,))
    expected = MetaModel.from_pretrained(tiny_base, dtype="fp32", quant=True, quant_type="nf4_single")
    assert torch.equal(found, expected.logits(TOKENS, (40,)))
    refused = called("tools/quantize.py", target, tmp_path / "again")
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"CheckpointError: {target}: is packed as nf4_single already; ")
    assert not (tmp_path / "again").exists()


def test_bitsandbytes_layout(called, tiny_base: Path, tmp_path: Path) -> None:
    """Embedding, head and norms are bf16 unless told."""
    done = called("tools/quantize.py", tiny_base, tmp_path / "out", "--to", "hf")
    assert done.returncode == 0, done.stderr[-3000:]
    source = open_source(tmp_path / "out")
    assert (source.format, source.storage) == ("Hugging Face", "nf4")
    assert source.tensors["output.weight"].dtype == "BF16"


def test_unknown_format(python, tiny_base: Path, tmp_path: Path) -> None:
    """The nearest is named in a line; status 1, nothing written."""
    done = python("tools/quantize.py", tiny_base, tmp_path / "out", "--quant_type", "nf5")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("ConfigError: --quant_type 'nf5' is unknown. Did you mean 'nf4'? Known: nf4, ")
    assert not list(tmp_path.iterdir())


def test_groups_that_no_run_can_name(called, tiny_base: Path, tmp_path: Path) -> None:
    """Files may have groups of 63; what is packed here has sizes that --quant_type of training knows."""
    done = called("tools/quantize.py", tiny_base, tmp_path / "out", "--quant_type", "int2_g63")
    assert done.stderr.startswith("ConfigError: --quant_type 'int2_g63' is unknown. Did you mean 'int2_g64'?")
    assert not (tmp_path / "out").exists()


def test_trained_part_is_no_base(called, tiny_base: Path, tmp_path: Path) -> None:
    """Its base would be packed with LoRA beside it, under settings that know of none."""
    part = write_trained(tiny_base, tmp_path / "part")
    done = called("tools/quantize.py", part, tmp_path / "out")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"CheckpointError: {part}: is a trained part; merge it (tools/merge.py)")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def calibration(tmp_path: Path, strings: list[str]) -> Path:
    """Text, a record a line."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(strings * 3), encoding="utf-8")
    return path


def test_calibrated_by_two_processes(torchrun, tiny_base: Path, calibration: Path, tmp_path: Path) -> None:
    """Under torchrun ranks divide the text; one writes, and the last line has all figures, perplexities too.

    The result is one process's but for the order of sums. A code in a thousand of the first block lies so near an edge
    that this tips it. The block after it has other inputs then, and error feedback carries each code that tips on to
    the columns after it: a tenth of its codes differ, as they do in one process that sums in another order (rows taken
    two at a time instead of four). So that block's error is compared.
    """
    flags = ["--rows", 8, "--own_rows", 8, "--row_tokens", 32, "--distill_steps", 2, "--distill_batch", 4]
    measured = ["--perplexity", calibration, "--seq", 64, "--windows", 2, "--device", "cpu", "--json"]
    where = [tiny_base, tmp_path / "out", "--quant_type", "int2_g64", "--calibrate", calibration]
    done = torchrun(2, "tools/quantize.py", *where, *flags, *measured)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    figures = json.loads(last)
    assert lines[0] == "own text: 8/8 rows" and lines[1].startswith("block   1/2 | error ")
    assert figures["bits"] == pytest.approx(2.5) and figures["text_after"] > 1 and "before" in lines[-1]
    settings = Settings("int2_g64", rows=8, own_rows=8, row_tokens=32, distill_steps=2, distill_batch=4)
    model, layout = open_base([tiny_base])[0], groups.start("cpu")
    alone = calibrated(model, tiny_base, tmp_path / "one", calibration, settings, Destination(), layout, lambda _: None)
    tensors = [open_source(tmp_path / name).tensors for name in ("out", "one")]
    for name in (name for name, tensor in tensors[0].items() if isinstance(tensor, PackedTensor)):
        codes = [whole_numbers(each[name].parts["codes"].read(), None, 2, each[name].shape[1]) for each in tensors]
        assert (codes[0] != codes[1]).float().mean() < (0.01 if name.startswith("layers.0.") else 0.3), name
    for both in zip(figures["blocks"], alone["blocks"], strict=True):
        assert both[0]["error"] == pytest.approx(both[1]["error"], rel=0.05)
    assert figures["perplexity"] == pytest.approx(alone["perplexity"], rel=0.05)


def test_flags_that_need_calibration(called, tiny_base: Path, calibration: Path, tmp_path: Path) -> None:
    """And a format that calibration cannot write."""
    done = called("tools/quantize.py", tiny_base, tmp_path / "out", "--json")
    assert done.stderr == "ConfigError: --json goes with --calibrate DATA: give that too, or leave --json out.\n"
    done = called(
        "tools/quantize.py",
        tiny_base,
        tmp_path / "out",
        "--calibrate",
        calibration,
        "--to",
        "hf",
        "--quant_type",
        "mix2.5",
    )
    assert done.stderr.startswith("ConfigError: --to hf: with --calibrate it is accessory, gptq or awq; ")
    done = called("tools/quantize.py", tiny_base, tmp_path / "out", "--calibrate", calibration)
    assert done.stderr.startswith("ConfigError: --quant_type 'nf4' cannot be calibrated; expected intB_gG")
