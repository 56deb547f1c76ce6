"""Every family on one rank and on two: what it computes is what transformers (or its formula) computes, and it trains.

A row of the table in docs/models.md is a case here, a column a test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.parallel.groups import Layout
from tests.model.families.matrix import CASES, FAMILIES_TABLE
from tests.model.families.subject import ANSWER, IDS, LENGTHS, PROMPTS, measure

WORKER = Path(__file__).with_name("families_worker.py")
TOLERANCE = 1e-4  # measured: 5.0e-5 (opt_350m, whose logits are the largest), elsewhere 1.2e-5 at most
NESTED_NOISE = 2e-2  # measured: 9.4e-3 (glm4), elsewhere 5.1e-3 at most
LEARNED = {"peft": 0.8, "qst": 0.9}
"""Of the first loss, what is left at most."""
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def on_one_rank(checkpoints, layout: Layout) -> dict[str, dict[str, Tensor]]:
    """Name of a case -> what is measured of it in this process."""
    root, _ = checkpoints
    return {name: measure(root / name, layout) for name in CASES}


@pytest.fixture(scope="module")
def on_two_ranks(checkpoints, torchrun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """The same, with every model cut over two processes."""
    root, _ = checkpoints
    target = tmp_path_factory.mktemp("two") / "found"
    done = torchrun(2, WORKER, root, target)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(target)


@pytest.fixture(scope="module")
def expected(checkpoints) -> dict[str, tuple[Tensor, list[list[int]]]]:
    """Name of a case -> the reference's logits [T, V] and its answers: a call for each document and prompt."""
    _, references = checkpoints
    return {
        name: (
            torch.cat([reference.logits(part) for part in IDS.split(LENGTHS)]),
            [reference.greedy(prompt, ANSWER) for prompt in PROMPTS],
        )
        for name, reference in references.items()
    }


@every_case
def test_logits(name: str, on_one_rank, expected, say) -> None:
    """Of packed documents, against each document alone."""
    check_logits(on_one_rank[name]["logits"], expected[name][0])
    say(FAMILIES_TABLE, name, "logits", "tested")


@every_case
def test_greedy_answers(name: str, on_one_rank, expected, say) -> None:
    """Token for token, through the key/value cache, of prompts of unequal length in one batch."""
    check_answers(on_one_rank[name]["answers"], expected[name][1])
    say(FAMILIES_TABLE, name, "greedy answers", "tested")


@every_case
@pytest.mark.parametrize(("method", "column"), [("peft", "NF4 + NormBiasLoRA"), ("qst", "NF4 + QST")])
def test_training(name: str, method: str, column: str, on_one_rank, say) -> None:
    """Beside NF4 a method lowers the loss of a repeated batch step by step."""
    check_training(method, on_one_rank[name][method])
    say(FAMILIES_TABLE, name, column, "tested")


@every_case
def test_on_two_ranks(name: str, on_one_rank, on_two_ranks, expected, say) -> None:
    """Everything, with the model cut in two; training learns as much as on one."""
    found = on_two_ranks[name]
    check_logits(found["logits"], expected[name][0])
    check_answers(found["answers"], expected[name][1])
    for method in LEARNED:
        check_training(method, found[method])
        # Scales of scales run over 256 blocks, which slices cut differently: another rounding of the same weights.
        expected_losses = on_one_rank[name][method]
        nearly_none = 1e-3 * float(expected_losses[0])  # where a model has learned the batch by heart
        torch.testing.assert_close(found[method], expected_losses, rtol=NESTED_NOISE, atol=nearly_none)
    say(FAMILIES_TABLE, name, "2-way tensor parallel", "tested")


def check_logits(found: Tensor, expected: Tensor) -> None:
    """Both [T, V]."""
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=TOLERANCE)


def check_answers(found: Tensor, expected: list[list[int]]) -> None:
    """Ids [ANSWER, prompts] against a list for each prompt."""
    assert expected[0] != expected[1] and len({token for answer in expected for token in answer}) > 3
    assert found.t().tolist() == expected


def check_training(method: str, losses: Tensor) -> None:
    """Losses [STEPS] that fall."""
    assert losses.isfinite().all()
    assert (losses.diff() < 0).all() and losses[-1] < LEARNED[method] * losses[0], losses


@every_case
def test_told_from_its_files(name: str, checkpoints) -> None:
    """Which family a checkpoint is needs no flag."""
    source = open_source(checkpoints[0] / name)
    case = CASES[name]
    assert (source.llama_type, model_args_of(source).architecture) == (case.llama_type, case.model_type)


def test_normalized_head_is_said(checkpoints) -> None:
    """Training has a note that the head was scaled once; other models have no such note."""
    said = {name: open_source(checkpoints[0] / name).notes for name in ("baichuan_7b", "baichuan2")}
    assert said["baichuan_7b"] == ()
    assert said["baichuan2"] == (
        "the rows of its head are scaled to length 1 as they are read, and not again in training",
    )


def test_every_family_and_model_type_has_a_case() -> None:
    from accessory.model.families import ARCHITECTURES, FAMILIES

    assert {case.model_type for case in CASES.values()} == set(ARCHITECTURES)
    assert {case.llama_type for case in CASES.values()} == set(FAMILIES)
