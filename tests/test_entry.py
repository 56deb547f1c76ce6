"""Wrong calls, as a user makes them: one clear message and a non-zero exit, on one rank and on two."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from accessory.config import AskConfig
from accessory.entry import run_entry, run_tool
from accessory.errors import ConfigError

MAIN = Path(__file__).resolve().parent.parent / "accessory" / "main_finetune.py"


def wrong_calls(base: Path, lora: Path, folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Name -> (flags to add to or override in a right call, what the message must say)."""
    typo = folder / "typo.json"
    typo.write_text('{"lora_rnak": 4}')
    empty = folder / "empty.json"
    empty.write_text("[]")
    records = folder / "records.json"
    records.write_text(json.dumps([{"instruktion": "a", "output": "b"}], indent=1))
    truncated = folder / "truncated"
    truncated.mkdir()
    torch.save({"tok_embeddings.weight": torch.zeros(512, 128)}, truncated / "whole.pth")
    (truncated / "consolidated.00.pth").write_bytes((truncated / "whole.pth").read_bytes()[:5000])
    foreign = folder / "foreign"
    foreign.mkdir()
    shutil.copytree(base, foreign, dirs_exist_ok=True)
    vocabulary = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] |= {f"extra{i}": 512 + i for i in range(3)}  # pieces, not tokens that somebody added
    (foreign / "tokenizer.json").write_text(json.dumps(vocabulary))
    orphan = folder / "orphan"
    orphan.mkdir()
    from safetensors.torch import save_file

    save_file({"norm.weight": torch.ones(128)}, orphan / "trainable.safetensors")
    gone = {"base": [{"path": str(folder / "gone"), "format": "Hugging Face", "fingerprint": "0"}]}
    (orphan / "run.json").write_text(json.dumps(gone | {"quantization": None}))
    return {
        "flag_typo": (["--llama_tpye", "llama_peft"], ["--llama_tpye", "Did you mean '--llama_type'"]),
        "key_typo": (["--llama_config", str(typo)], ["typo.json", "lora_rnak", "Did you mean 'lora_rank'"]),
        "missing_tokenizer": (["--tokenizer_path", str(folder / "none.model")], ["--tokenizer_path", "none.model"]),
        "wrong_vocabulary": (["--tokenizer_path", str(foreign)], ["515 tokens", "512 rows", "--tokenizer_path"]),
        "model_parallel_size": (["--model_parallel_size", "3"], ["--model_parallel_size 3", "sizes that do"]),
        "quant_full": (["--llama_type", "llama", "--llama_config", "--quant", "--only_save_trainable"],
                       ["--quant", "use --llama_type llama_peft"]),
        "quant_saving_all": (["--quant"], ["--quant needs --only_save_trainable"]),
        "empty_data": (["--data_config", str(empty)], ["empty.json", "not one record"]),
        "record_without_instruction": (["--data_config", str(records)],
                                       ["records.json:2", "columns: {instruction: instruktion}"]),
        "truncated_pth": (["--pretrained_path", str(truncated), "--tokenizer_path", str(base)],
                          ["consolidated.00.pth", "truncated"]),
        "base_gone": (["--pretrained_path", str(orphan)], ["orphan", "was trained on the base", "gone"]),
        "two_at_once": (["--lr", "fast", "--epochz", "3"], ["--lr", "'fast'", "--epochz", "'--epochs'"]),
    }  # fmt: skip


NAMES = (
    "flag_typo", "key_typo", "missing_tokenizer", "wrong_vocabulary", "model_parallel_size", "quant_full",
    "quant_saving_all", "empty_data", "record_without_instruction", "truncated_pth", "base_gone", "two_at_once",
)  # fmt: skip


@pytest.fixture(scope="module")
def calls(tiny_base: Path, lora_config: Path, tmp_path_factory: pytest.TempPathFactory):
    """The wrong calls, their files made."""
    return wrong_calls(tiny_base, lora_config, tmp_path_factory.mktemp("wrong"))


# Over two ranks, one for each place at which a call may be found wrong.
@pytest.mark.parametrize(("name", "ranks"), [
    *((name, 1) for name in NAMES),
    *((name, 2) for name in ("flag_typo", "model_parallel_size", "empty_data", "truncated_pth")),
])  # fmt: skip
def test_wrong_call(name: str, ranks: int, calls, tiny_base, lora_config, tmp_path, python, torchrun) -> None:
    extra, expected = calls[name]
    data = MAIN.parent.parent / "data_example" / "accessory_qa.json"
    right = ["--pretrained_path", tiny_base, "--llama_type", "llama_peft", "--llama_config", lora_config]
    right += ["--data_config", data, "--device", "cpu", "--output_dir", tmp_path / "out", "--max_steps", "1"]
    start = python if ranks == 1 else (lambda *arguments, **options: torchrun(2, *arguments, **options))
    done = start(MAIN, *right, *extra, timeout=60)
    # torchrun ends with a report (and a traceback) of its own, whatever the worker said.
    said = done.stderr.split("torch/distributed/elastic")[0]
    assert done.returncode != 0
    for words in expected:
        assert words in said, said[-2000:]
    assert said.count("Error: ") == 1, said[-2000:]
    assert "Traceback" not in said, said[-2000:]
    assert not list(tmp_path.glob("out/epoch*"))


@pytest.mark.parametrize("bad", ["file", "nothing_to_train"])
def test_found_before_anything_is_read(bad: str, tiny_base, tmp_path, python) -> None:
    (tmp_path / "out").write_text("a file stands here")
    none = tmp_path / "none.json"
    none.write_text('{"norm_tuning": false, "bias_tuning": false}')
    data = MAIN.parent.parent / "data_example" / "accessory_qa.json"
    call = [
        MAIN,
        "--pretrained_path",
        tiny_base,
        "--llama_type",
        "llama_peft",
        "--data_config",
        data,
        "--device",
        "cpu",
    ]
    call += {"file": ["--output_dir", tmp_path / "out"], "nothing_to_train": ["--llama_config", none, "--dry_run"]}[bad]
    done = python(*call, timeout=60)
    assert done.returncode == 2
    assert {"file": "--output_dir", "nothing_to_train": "nothing would be trained"}[bad] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("kind", "status"), [("entry", ConfigError.status), ("tool", 1)])
def test_a_thread_that_frees_tensors_does_not_abort_the_end(kind: str, status: int, tiny_base, python) -> None:
    """An interpreter that is taken apart meanwhile is ended by SIGABRT."""
    done = python("-m", "tests.ending_worker", kind, "--pretrained_path", tiny_base)
    assert (done.returncode, done.stdout) == (status, "written"), done.stderr
    assert done.stderr.strip() == "ConfigError: said"


@pytest.mark.parametrize("run", [partial(run_entry, AskConfig), run_tool])
def test_ctrl_c_ends_a_command_without_a_traceback(run: Callable, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """While a model is loaded, say, or quantized."""

    def interrupted(*config: AskConfig) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["demo", "--pretrained_path", "."])
    with pytest.raises(SystemExit) as left:
        run(interrupted)
    assert left.value.code == 130 and capsys.readouterr().err == "\nInterrupted.\n"
