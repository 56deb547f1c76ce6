"""`MultiGpuWrapper` on two processes of the CPU gives what one process gives, and ends as one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from accessory import AccessoryError, MetaModel, MultiGpuWrapper
from accessory.errors import CheckpointError, ConfigError, LostRankError
from accessory.parallel import groups

HOW = {"dtype": torch.float32, "max_seq_len": 128}


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


def interrupted(*_: object) -> None:
    """As Ctrl-C does."""
    raise KeyboardInterrupt


def test_it_is_one_model(tiny_base: Path, python, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all that it is asked, errors included; where one process dies, all end."""
    one = MetaModel.from_pretrained(tiny_base, **HOW)
    sampled = {"max_gen_len": 8, "temperature": 1.0, "seed": 3}
    with MultiGpuWrapper(tiny_base, gpus=2, device="cpu", **HOW) as two:
        question = two.question("What?", prompt_layout="dialog")
        assert question == one.question("What?", prompt_layout="dialog")
        for prompts in ("Hello", ["Hello", "What?"], question):
            assert two.generate(prompts, max_gen_len=8) == one.generate(prompts, max_gen_len=8)
        assert two.generate("Hello", **sampled) == one.generate("Hello", **sampled)
        stream = two.stream_generate("Hello", max_gen_len=8)
        first = next(stream)
        with pytest.raises(ConfigError, match=r"A stream of stream_generate\(\) is open"):
            two.generate("Hello")
        stream.close()  # what is left of it is not computed
        whole = list(two.stream_generate("Hello", max_gen_len=8))
        assert whole == list(one.stream_generate("Hello", max_gen_len=8)) and whole[0] == first
        for found, wanted in zip(two.compute_logits(["Hello", "a"]), one.compute_logits(["Hello", "a"]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        found, wanted = (m.evaluate_examples(["Hello you"], ["Hello"]) for m in (two, one))
        assert found["log_likelihood"] == pytest.approx(wanted["log_likelihood"], rel=1e-5)
        assert two.tokenizer.encode("Hello you") == one.tokenizer.encode("Hello you")
        with pytest.raises(ConfigError, match="'top_p' is 7"):
            two.generate("Hello", top_p=7)
        assert two.generate("Hello", max_gen_len=8) == one.generate("Hello", max_gen_len=8)  # it goes on
        stream = two.stream_generate("What?", max_gen_len=8)
        for ask in (lambda: two.generate("What?", max_gen_len=8), lambda: [next(stream), next(stream)]):
            with monkeypatch.context() as patch:  # Ctrl-C while the processes compute
                patch.setattr("accessory.multi_gpu.wrapper.wait", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    ask()
            assert two.generate("Hello", max_gen_len=8) == one.generate("Hello", max_gen_len=8)
        two.use(None)
        assert two.generate("Hello", max_gen_len=8) == one.generate("Hello", max_gen_len=8)
        os.kill(two._processes[1].pid, signal.SIGKILL)
        with pytest.raises(LostRankError, match=r"A process of MultiGpuWrapper has ended: .*rank 1 with status -9"):
            two.generate("Hello", max_gen_len=100)
        with pytest.raises(ConfigError, match="have ended; make another"):
            two.generate("Hello")


def test_a_model_that_cannot_be_loaded(tmp_path: Path, python, capfd: pytest.CaptureFixture) -> None:
    """Is the error that it would be in one process, and no process stays. Nothing else is printed."""
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        MultiGpuWrapper(tmp_path / "absent", gpus=2, device="cpu")
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("places", [
    {}, {"gpus": 0}, {"gpus": "2"}, {"gpu_ids": []}, {"gpu_ids": [1, 1]}, {"gpus": 1, "gpu_ids": [0]},
    {"gpu_ids": ["a"]},
])  # fmt: skip
def test_gpus_that_cannot_be(places: dict) -> None:
    """Both, neither, none, one twice."""
    with pytest.raises(ConfigError, match=r"gpus is .*expected"):
        MultiGpuWrapper("base", **places)


def test_under_a_launcher_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(AccessoryError, match="MultiGpuWrapper starts its own processes: leave out torchrun"):
        MultiGpuWrapper("base", gpus=2)
