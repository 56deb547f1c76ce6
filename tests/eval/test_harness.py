"""Tasks of the lm-eval harness by our model and by its own, on the same files."""

from __future__ import annotations

import pytest

from accessory.errors import ConfigError, DataError
from accessory.eval.harness import Harness, TaskSettings

pytest.importorskip("lm_eval", reason="the extra eval is not installed")


from accessory.eval.report import task_object
from tests.eval.beside_hf import SIX, compare

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", [*SIX.split(","), "mmlu_anatomy"])
def test_predictions_are_those_of_the_harness(both, task: str) -> None:
    """Every one, log-likelihoods to 1e-3, and so each figure with its error."""
    found = compare(*both, task)
    assert (found.predictions, found.greedy) == (0, 0)
    assert found.log_p < 1e-3
    assert found.ours.metrics == found.theirs.metrics
    assert found.ours.documents == 5
    assert all(error is not None for _, error in found.ours.metrics.values())


def test_examples_are_shown(both) -> None:
    """From the training file, where there is one; else it is said what is missing."""
    harness = Harness(both[0]._asked.model, TaskSettings(2, task_data=both[0]._settings.task_data))
    found = harness.run("arc_easy")
    asked = found.predictions[0]["arguments"][0][0]
    assert task_object(found)["num_fewshot"] == 2
    assert asked.count("Question:") == 3 and asked.count("Answer:") == 3
    said = r"piqa: 2 examples \(--num_fewshot\) are taken from its training file, which .*train-labels.lst"
    with pytest.raises(DataError, match=said):
        harness.run("piqa")


def test_unknown_tasks_are_named(both) -> None:
    with pytest.raises(ConfigError, match=r"Task 'piqq' is unknown. Did you mean 'piqa'\?"):
        both[0].check(["piqa", "piqq"])
