"""Every family on one rank and on two: what it computes is what transformers (or its formula) computes, and it trains.

The table in `matrix.py` is that of docs/models.md: a row is a case here, a column a test.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.parallel.groups import Layout
from tests.model.families.matrix import CASES, CHECKS, families_table
from tests.model.families.subject import ANSWER, IDS, LENGTHS, PROMPTS, measure

WORKER = Path(__file__).with_name("families_worker.py")
TOLERANCE = 1e-4  # measured: 5.0e-5 (opt_350m, whose logits are the largest), elsewhere 1.2e-5 at most
NESTED_NOISE = 2e-2  # measured: 9.4e-3 (glm4), elsewhere 5.1e-3 at most
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
def test_logits(name: str, on_one_rank, on_two_ranks, expected) -> None:
    """Of packed documents, against each document alone."""
    wanted = expected[name][0].float()
    assert wanted.std() > 0.5
    for found in (on_one_rank[name]["logits"], on_two_ranks[name]["logits"]):
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@every_case
def test_greedy_answers(name: str, on_one_rank, on_two_ranks, expected) -> None:
    """Token for token, through the key/value cache, of prompts of unequal length in one batch."""
    answers = expected[name][1]
    assert answers[0] != answers[1] and len({token for answer in answers for token in answer}) > 3
    for found in (on_one_rank[name]["answers"], on_two_ranks[name]["answers"]):
        assert found.t().tolist() == answers


@every_case
def test_training(name: str, on_one_rank, on_two_ranks) -> None:
    """NormBiasLoRA beside NF4 lowers the loss of a repeated batch step by step, and as much on two ranks as on one."""
    one, two = on_one_rank[name]["losses"], on_two_ranks[name]["losses"]
    for losses in (one, two):
        assert losses.isfinite().all()
        assert (losses.diff() < 0).all() and losses[-1] < 0.8 * losses[0], losses
    # Scales of scales run over 256 blocks, which slices cut differently: another rounding of the same weights.
    torch.testing.assert_close(two, one, rtol=NESTED_NOISE, atol=0)


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


def test_table() -> None:
    """A row a case, each as wide as the head; every family and model type that is read has a row."""
    from accessory.model.families import ARCHITECTURES, FAMILIES

    head, rule, *rows = families_table().splitlines()
    assert len(rows) == len(CASES)
    assert {line.count("|") for line in (head, rule, *rows)} == {len(CHECKS) + 5}
    assert {case.model_type for case in CASES.values()} == set(ARCHITECTURES)
    assert {case.llama_type for case in CASES.values()} == set(FAMILIES)
