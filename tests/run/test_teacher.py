"""Runs with a teacher: the loss they train, on every method, storage and layout, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from accessory.config import FinetuneConfig
from accessory.data.corpus import Corpus
from accessory.errors import AccessoryError
from accessory.export import Destination, convert
from accessory.finetuning import finetune
from accessory.meta import MetaModel
from tests.conftest import DATA, ROOT, TINY_CONFIG, VOCABULARY, write_model, write_tokenizer
from tests.model.families.matrix import CASES, Reference
from tests.model.families.matrix import VOCABULARY as ROWS

WORKER = ROOT / "tests" / "finetune_worker.py"
METHODS = {
    "LoRA on NF4": {"llama_type": "llama_peft", "lora_r": 4, "quant": True},
    "norms and biases": {"llama_type": "llama_peft"},
    "all": {"llama_type": "llama", "only_save_trainable": False},
    "side": {"llama_type": "llama_qst", "quant": True, "quant_type": "int8"},  # it draws half of a step's labels
    "statistics": {"llama_type": "llama_qsft", "quant": True, "quant_type": "int2_g64"},
}


class Student(NamedTuple):
    """How a family is trained, and which one teaches it."""

    suffix: str
    teacher: str
    settings: Mapping[str, Any] = MappingProxyType({})
    quant: bool = False


FAMILIES = {
    "opt": Student("_peft", "opt", {"lora_rank": 4}, quant=True),
    "bloom": Student("_qst", "neox", {"label_share": 1}),
    "neox": Student("", "glm"),
    "glm": Student("_peft", "opt"),
}
TEACHING = {"teacher_weight": 0.3, "teacher_temperature": 2.0}


@pytest.fixture
def given(tiny_base: Path, tmp_path: Path):
    """Flags of a run of two steps of 8 of 16 documents, in fp32."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps(json.loads(DATA.read_text())[:16]))

    def flags(**more: Any) -> dict[str, Any]:
        return {
            "pretrained_path": [tiny_base], "data_config": data, "output_dir": tmp_path / "run", "device": "cpu",
            "precision": "fp32", "epochs": 1, "batch_size": 4, "accum_iter": 2, "max_words": 128, "overwrite": True,
            "only_save_trainable": True, "lr": 5e-3, "warmup_epochs": 0, **more,
        }  # fmt: skip

    return flags


def log(flags: dict[str, Any]) -> list[dict[str, float]]:
    """Run it; every line of its log."""
    shutil.rmtree(flags["output_dir"], ignore_errors=True)
    finetune(FinetuneConfig(**flags))
    return [json.loads(line) for line in (flags["output_dir"] / "log.jsonl").read_text().splitlines()]


Logits = Callable[[Tensor], Tensor]
"""Of ids [S]: [S, V]."""


def logits_of(model: MetaModel) -> Logits:
    """What our own model computes."""
    return lambda ids: model.logits(ids, (len(ids),))


def of_transformers(model: nn.Module, ids: Tensor) -> Tensor:
    """`Logits` of a model there."""
    return model(ids[None]).logits[0]


def loss_of(own: Logits, theirs: Logits, corpus: Corpus, prompts: float = 0.0, rows: int = VOCABULARY) -> Tensor:
    """(mean cross-entropy, mean t^2 KL) of all documents in fp64, with all logits.

    prompts: the weight of theirs. rows: of both heads.
    """
    t, sums = TEACHING["teacher_temperature"], torch.zeros(3).double()
    for index in range(len(corpus)):
        tokens, labels = (torch.from_numpy(part.astype("int64")) for part in corpus.document(index))
        weights = torch.where(labels >= 0, 1.0, prompts).double()[:-1]
        mine, taught = (logits(tokens)[:-1].double() for logits in (own, theirs))
        entropy = -mine.log_softmax(1).gather(1, tokens[1:, None])[:, 0]
        p, q = ((logits / t).log_softmax(1) for logits in (taught[:, :rows], mine[:, :rows]))
        divergence = t * t * (p.exp() * (p - q)).sum(1)
        sums = sums + torch.stack([(weights * entropy).sum(), (weights * divergence).sum(), weights.sum()])
    return sums[:2] / sums[2]


def by_hand(model: MetaModel, teacher: MetaModel, data: Path, prompts: float = 0.0) -> tuple[float, float]:
    """`loss_of` our own models."""
    corpus = model.corpus(data, max_words=128)
    return tuple(loss_of(logits_of(model), logits_of(teacher), corpus, prompts).tolist())


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_cross_entropy_and_divergence(given, tiny_base: Path, tmp_path: Path, name: str) -> None:
    """Of the first step, on a step of all documents, from the run's own base; then it learns. Both parts are told."""
    flags = given(**METHODS[name], **TEACHING, teacher="base", batch_size=8, epochs=6)
    steps = log(flags)
    how = {"dtype": "fp32", "quant": flags.get("quant", False), "quant_type": flags.get("quant_type")}
    base = MetaModel.from_pretrained(tiny_base, dtype="fp32")
    entropy, divergence = by_hand(MetaModel.from_pretrained(tiny_base, **how), base, flags["data_config"])
    within = 0.2 if name == "side" else 1e-4
    assert steps[0]["cross_entropy"] == pytest.approx(entropy, rel=within)
    assert steps[0]["divergence"] == pytest.approx(divergence, rel=within, abs=1e-5)
    assert (divergence < 1e-5) == ("quant" not in METHODS[name])
    assert all(0.7 * s["cross_entropy"] + 0.3 * s["divergence"] == pytest.approx(s["loss"]) for s in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Reference]]:
    """(directory with a tiny checkpoint of each of `FAMILIES`, its model in transformers, in fp64, by name)."""
    root, references = tmp_path_factory.mktemp("families"), {}
    for name in FAMILIES:
        (root / name).mkdir()
        references[name] = CASES[name].write(root / name)
        references[name].model.double()
        write_tokenizer(root / name)
    return root, references


@pytest.mark.slow
@pytest.mark.parametrize("student", FAMILIES)
def test_families_learn_from_each_other(given, families, tmp_path: Path, student: str) -> None:
    """Loss and validation by the formula in fp64, of logits that transformers computes; and the gradient's norm."""
    (root, references), case = families, FAMILIES[student]
    (tmp_path / "method.json").write_text(json.dumps(dict(case.settings)))
    flags = given(**TEACHING, pretrained_path=[root / student], llama_type=student + case.suffix, max_words=64,
                  llama_config=[tmp_path / "method.json"], teacher="base" if case.teacher == student else
                  root / case.teacher, quant=case.quant, only_save_trainable=case.suffix != "",
                  clip_grad=0)  # fmt: skip
    records = [{"prompt": record["instruction"][:40], "completion": record["output"][:40]}
               for record in json.loads(DATA.read_text())[:8]]  # fmt: skip
    flags["data_config"].write_text(json.dumps(records))
    flags["val_data"] = flags["data_config"]
    evaluated, step, _ = log(flags)
    own = MetaModel.from_pretrained(root / student, dtype="fp32", quant=case.quant)
    logits = {name: partial(of_transformers, reference.model) for name, reference in references.items()}
    found = loss_of(logits_of(own) if case.quant else logits[student], logits[case.teacher],
                    own.corpus(flags["data_config"], max_words=64), rows=ROWS)  # fmt: skip
    assert (step["cross_entropy"], step["divergence"]) == pytest.approx(found.tolist(), rel=1e-4)
    assert (evaluated["val_loss"], evaluated["val_divergence"]) == pytest.approx(found.tolist(), rel=1e-4)
    if case.suffix == "":
        everything = list(references[student].model.parameters())
        gradients = torch.autograd.grad(0.7 * found[0] + 0.3 * found[1], everything)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().item()
        assert step["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.slow
def test_prompts_accumulation_and_recomputing(given, tiny_base: Path) -> None:
    """Prompts count in both parts by their weight; how a step is cut or recomputed changes nothing."""
    flags = given(**METHODS["LoRA on NF4"], **TEACHING, teacher="base", prompt_loss_weight=0.25, epochs=4)
    models = (MetaModel.from_pretrained(tiny_base, dtype="fp32", quant=packed) for packed in (True, False))
    entropy, divergence = by_hand(*models, flags["data_config"], prompts=0.25)
    whole, parts = (log(flags | more) for more in (
        {"batch_size": 16, "accum_iter": 1}, {"batch_size": 1, "accum_iter": 16, "checkpointing": "all"}))  # fmt: skip
    assert (whole[0]["cross_entropy"], whole[0]["divergence"]) == pytest.approx((entropy, divergence), rel=1e-4)
    for name in ("loss", "cross_entropy", "divergence", "grad_norm"):
        assert [s[name] for s in whole] == pytest.approx([s[name] for s in parts], rel=1e-4)


def test_fp16_and_validation(given, tiny_base: Path) -> None:
    """fp16's loss scale reaches both parts; a validation's loss is that without a teacher, its divergence beside it."""
    flags = given(**METHODS["LoRA on NF4"], **TEACHING, batch_size=8, eval_steps=1)
    flags["val_data"] = flags["data_config"]
    narrow, wide = log(flags | {"teacher": "base", "precision": "fp16"}), log(flags | {"teacher": "base"})
    assert [s["loss"] for s in narrow if "loss" in s] == pytest.approx(
        [s["loss"] for s in wide if "loss" in s], rel=3e-3
    )
    assert [s["grad_norm"] for s in narrow if "loss" in s] == pytest.approx(
        [s["grad_norm"] for s in wide if "loss" in s], rel=0.03
    )
    assert wide[0]["val_divergence"] == pytest.approx(wide[1]["divergence"], rel=1e-4)
    assert wide[2]["val_divergence"] != wide[0]["val_divergence"]
    for name in TEACHING:
        del flags[name]
    alone = log(flags)[0]
    assert wide[0]["val_loss"] == alone["val_loss"] == pytest.approx(wide[1]["cross_entropy"], rel=1e-4)
    assert "val_divergence" not in alone


@pytest.mark.slow
def test_resuming_is_exact(given) -> None:
    """The same losses with ==; with another weight it is another run, unless that is allowed."""
    flags = given(**METHODS["LoRA on NF4"], **TEACHING, teacher="base", epochs=2)
    whole = log(flags)
    out = flags["output_dir"]
    log(flags | {"max_steps": 2})
    flags["resume"] = out / "epoch0"
    finetune(FinetuneConfig(**flags))
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [step["loss"] for step in whole]
    flags |= {"teacher_weight": 0.5, "output_dir": out.with_name("other")}
    with pytest.raises(AccessoryError, match=r"teacher\.weight was 0\.3, is 0\.5\. .*--allow_changed teacher"):
        finetune(FinetuneConfig(**flags))
    finetune(FinetuneConfig(**flags, allow_changed=["teacher"]))


@pytest.fixture
def larger(tmp_path: Path) -> Path:
    """A teacher of three layers, with eight rows more than it has tokens."""
    (directory := tmp_path / "larger").mkdir()
    write_model(directory, TINY_CONFIG | {"num_hidden_layers": 3, "vocab_size": 520})
    write_tokenizer(directory)
    return directory


@pytest.mark.slow
def test_another_model_teaches(given, tiny_base: Path, larger: Path) -> None:
    """Packed too; rows that belong to no token are left out of the comparison, on either side."""
    flags = given(**METHODS["LoRA on NF4"], **TEACHING, teacher=larger, batch_size=8)
    student = MetaModel.from_pretrained(tiny_base, dtype="fp32", quant=True)
    for kind in (None, "int8"):
        teacher = MetaModel.from_pretrained(larger, dtype="fp32", quant=kind is not None, quant_type=kind)
        entropy, divergence = by_hand(student, teacher, flags["data_config"])
        step = log(flags | {"teacher_quant_type": kind})[0]
        assert (step["cross_entropy"], step["divergence"]) == pytest.approx((entropy, divergence), rel=1e-4)
    wide = log(flags | {"pretrained_path": [larger], "teacher": tiny_base})[0]
    entropy, divergence = by_hand(MetaModel.from_pretrained(larger, dtype="fp32", quant=True),
                                  MetaModel.from_pretrained(tiny_base, dtype="fp32"), flags["data_config"])  # fmt: skip
    assert (wide["cross_entropy"], wide["divergence"]) == pytest.approx((entropy, divergence), rel=1e-4)


@pytest.mark.slow
def test_what_a_run_trained_teaches(given, tiny_base: Path) -> None:
    """A trained part alone, which knows its base and how it was packed; a student that is the same has no distance."""
    flags = given(**METHODS["LoRA on NF4"], batch_size=8)
    log(flags | {"epochs": 5, "lr": 0.02, "save_interval": 5})
    part = flags["output_dir"] / "epoch4"
    more = {"teacher": part, "output_dir": flags["output_dir"].with_name("taught")}
    step = log(flags | more)[0]
    base, taught = (MetaModel.from_pretrained(path, dtype="fp32", quant=True) for path in (tiny_base, part))
    wanted = by_hand(base, taught, flags["data_config"])
    assert step["cross_entropy"] == pytest.approx(wanted[0], rel=1e-4) and step["divergence"] > 0.01
    assert log(flags | more | {"pretrained_path": [part]})[0]["divergence"] == pytest.approx(0, abs=1e-5)


def test_layouts(given, tiny_base: Path, torchrun, tmp_path: Path) -> None:
    """Two ranks train and evaluate as one process: beside a base that is shared, one that learns, a packed one."""
    cases = "norms and biases", "all", "statistics"
    layouts = {
        "tp2": {"model_parallel_size": 2, "batch_size": 4},
        "sdp2": {"batch_size": 2},
        "fsdp2": {"batch_size": 2, "data_parallel": "fsdp"},
    }
    lists, wanted = [], {}
    for name in cases:
        flags = given(**METHODS[name], **TEACHING, teacher="base", val_data=tmp_path / "data.json")
        wanted[name] = figures(log(flags | {"output_dir": tmp_path / name / "one"}))
        lists += [words(flags | layout | {"output_dir": tmp_path / name / at}) for at, layout in layouts.items()]
    (tmp_path / "flags.json").write_text(json.dumps(lists))
    done = torchrun(2, WORKER, tmp_path / "flags.json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for name in cases:
        for at in layouts:
            lines = (tmp_path / name / at / "log.jsonl").read_text().splitlines()
            found = figures([json.loads(line) for line in lines])
            assert found == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), (name, at)


def figures(log: list[dict[str, float]]) -> list[float]:
    """Losses of steps, and divergences of evaluations."""
    return [line["loss"] if "loss" in line else line["val_divergence"] for line in log]


def words(flags: dict[str, Any]) -> list[str]:
    """As on a command line."""
    given = {name: value for name, value in flags.items() if value is not False}
    values = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
    return [word for name, found in values.items()
            for word in (f"--{name}", *(str(value) for value in found if value is not True))]  # fmt: skip


def test_what_is_refused(given, tiny_base: Path, larger: Path, tmp_path: Path) -> None:
    """Before any weight is read, by the flag's name, with what was found."""

    def refusal(**more: Any) -> str:
        with pytest.raises(AccessoryError) as caught:
            log(given(**METHODS["LoRA on NF4"] | more))
        return str(caught.value)

    packed = tmp_path / "packed"
    convert([tiny_base], packed, Destination(to="accessory", quant_type="nf4"))
    assert re.match(f"--teacher base: {packed} is packed as nf4 already, .*--teacher DIR", refusal(
        pretrained_path=[packed], teacher="base"))  # fmt: skip
    tokens = json.loads((larger / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (larger / "tokenizer.json").write_text(json.dumps(tokens))
    said = f"--teacher {larger}: Token [0-9]+ is 'a' in the student's vocabulary .* where it is 'b'"
    assert re.match(said, refusal(teacher=larger))
    assert re.match("--teacher base: Token 512 is '<x>' .* which has no such token", refusal(
        teacher="base", new_tokens=["<x>"], llama_type="llama", quant=False, lora_r=None))  # fmt: skip
    assert re.match(f"--teacher {tmp_path / 'gone'}: no such file", refusal(teacher=tmp_path / "gone"))
    assert "--teacher_temperature" in refusal(teacher_temperature=2.0)
