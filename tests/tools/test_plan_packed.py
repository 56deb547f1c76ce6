"""tools/plan.py on a base that is packed already: its matrices are planned as they lie, to the byte."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.checkpoint.strategy import STRATEGY_FILE
from accessory.export import Destination, open_base
from accessory.meta import MetaModel
from accessory.parallel import groups
from tests.checkpoint.formats.low_bit_models import WRITERS, changed
from tests.checkpoint.test_strategy import strategy
from tools.plan import METHODS, PLAIN, Setting, default_storage, planned, stored

PLAN = "tools/plan.py"


@pytest.fixture(scope="module", autouse=True)
def layout() -> Iterator[groups.Layout]:
    """This process alone, on the CPU."""
    yield groups.start("cpu")
    groups.stop()


def nf4(base: Path, target: Path) -> Path:
    """Packed by us, for Hugging Face."""
    Destination("hf", "fp32", quant_type="nf4").write(open_base([base])[0], target)
    return target


def gptq_with_a_plain_linear(base: Path, target: Path) -> Path:
    """In 2 bits but for one."""

    def unpack(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.up_proj"
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]
        tensors[f"{name}.weight"] = torch.ones(256, 128)

    return changed(WRITERS["gptq-2"](base, target.with_name("whole")), target, unpack)


BASES: dict[str, Callable[[Path, Path], Path]] = {
    "nf4": nf4,
    "2 bits, one plain": gptq_with_a_plain_linear,
    "3 bits, channels in another order": lambda *at: WRITERS["gptq-3-act"](*at).path,
    "2 and 4 bits": lambda *at: WRITERS["greenbit"](*at).path,
}


def plan_of(path: Path, method: str, quant_type: str | None = None) -> int:
    """Bytes of frozen and trained weights."""
    setting = Setting(method, stored(str(path), quant_type) or default_storage(method), "fp32")
    made, _, _ = planned(str(path), setting, torch.device("cpu"))
    return made.weights + made.trainable


def allocated(path: Path, method: str, **how: object) -> int:
    """The same of a model that is there to be trained."""
    made = METHODS[method]
    kind = f"llama{made.suffix}"
    model = MetaModel.from_pretrained(
        path, train=True, dtype="fp32", llama_type=kind, llama_config=made.settings.model_dump(), **how
    )
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "method"), [*((name, "lora") for name in BASES), ("2 and 4 bits", "qsft")])
def test_bytes_are_those_of_training(tiny_base: Path, tmp_path: Path, name: str, method: str) -> None:
    """Which differ from those of NF4, the default for a plain base."""
    path = BASES[name](tiny_base, tmp_path / "base")
    assert plan_of(path, method) == allocated(path, method)
    assert name == "nf4" or plan_of(path, method) != plan_of(tiny_base, "lora", "nf4")


def test_a_mix_of_a_plain_base_is_planned_as_its_strategy_says(tiny_base: Path, tmp_path: Path) -> None:
    """Not as a quarter of every block."""
    path = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    (path / STRATEGY_FILE).write_text(json.dumps({"measurement": strategy()}))
    assert plan_of(path, "lora", "mix2.5") == allocated(path, "lora", quant=True, quant_type="mix2.5")
    assert plan_of(path, "lora", "mix2.5") != plan_of(tiny_base, "lora", "mix2.5")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--quant_type", "nf4"], r"--quant_type nf4: \S+ is packed as int2_g64 already"),
        (["--quant_type", PLAIN], r"--quant_type none: \S+ is packed as int2_g64, and its full weights are gone\."),
        (["--method", "full"], r"--method full: \S+ is packed, and int2_g64 weights cannot be trained"),
    ],
)
def test_what_the_base_cannot_be_is_refused(
    called: Callable, tiny_base: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    """As training refuses it."""
    done = called(PLAN, WRITERS["gptq-2"](tiny_base, tmp_path / "base").path, *flags)
    assert done.returncode == 1 and re.match(rf"ConfigError: {message}", done.stderr), done.stderr


def test_a_packed_base_is_not_proposed_in_another_format(called: Callable, tiny_base: Path, tmp_path: Path) -> None:
    """--quant_type nf4 would be refused."""
    path = WRITERS["gptq-2"](tiny_base, tmp_path / "base").path
    said = called(PLAN, path, "--device_memory", "0.001", "--device", "cpu").stdout
    assert "It does not fit" in said and "quant_type" not in said
