"""tools/predict.py as a process."""

from __future__ import annotations

import json
from pathlib import Path

from accessory.eval.text_metrics import read_pairs
from tests.eval.test_predict import RECORDS


def test_the_tool(tiny_base: Path, tmp_path: Path, called) -> None:
    """Writes what tools/evaluate.py --texts reads, and nothing over what is there."""
    data, output = tmp_path / "val.json", tmp_path / "predictions.jsonl"
    data.write_text(json.dumps(RECORDS))
    line = ("tools/predict.py", tiny_base, "--data", data, "--output", output, "--max_gen_len", "3", "--device", "cpu")
    done = called(*line)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f"3 predictions -> {output}"
    assert [pair.reference for pair in read_pairs(output)] == [each["output"] for each in RECORDS]
    again = called(*line)
    assert again.returncode == 1 and f"--output {output}: is there already" in again.stderr
