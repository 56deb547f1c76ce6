"""Tasks of the lm-eval harness by our model and by its own, on the same files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tokenizers
import torch

from accessory.errors import ConfigError, DataError
from accessory.eval.harness import Harness, TaskSettings
from accessory.meta import MetaModel
from tests.eval.published import words, write_published

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval.api.instance import Instance

from accessory.eval.harness_model import HarnessModel
from accessory.eval.report import task_object
from tests.eval.beside_hf import SIX, TheirHarness, compare


@pytest.fixture(scope="module")
def directory(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_base` with a tokenizer that adds BOS in transformers, too."""
    copy = shutil.copytree(tiny_base, tmp_path_factory.mktemp("with_bos"), dirs_exist_ok=True)
    tokenizer = tokenizers.Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(copy / "tokenizer.json"))
    return copy


@pytest.fixture(scope="module")
def both(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Harness, TheirHarness]:
    """Both harnesses, over published files; two examples are shown."""
    data = write_published(tmp_path_factory.mktemp("data"))
    settings = TaskSettings(task_data=data)
    ours = MetaModel.from_pretrained(directory, dtype="fp32", max_seq_len=256, device="cpu")
    return Harness(ours, settings), TheirHarness(directory, settings, batch_size=4)


@pytest.mark.parametrize("task", [*SIX.split(","), "mmlu_anatomy"])
def test_predictions_are_those_of_the_harness(both, task: str) -> None:
    """Every one, log-likelihoods to 1e-3, and so each figure with its error."""
    found = compare(*both, task)
    assert (found.predictions, found.greedy) == (0, 0)
    assert found.log_p < 1e-3
    assert found.ours.metrics == found.theirs.metrics
    assert found.ours.documents == 5
    assert all(error is not None for _, error in found.ours.metrics.values())


def test_text_and_answers_are_those_of_the_harness(both) -> None:
    """Whole texts in windows, with a document longer than the model; greedy answers up to a text that ends them."""
    ours, theirs = (harness._asked for harness in both)
    texts = [words(1, 9), " ".join(words(seed, 60) for seed in range(9))]
    requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    ours.model.max_seq_len = theirs._max_length = 100
    one, other = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    ours.model.max_seq_len = theirs._max_length = 256
    assert one == pytest.approx(other, abs=1e-2)
    how = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    asked = [Instance("generate_until", {}, (words(seed, seed + 2), dict(how)), seed) for seed in range(5)]
    asked.append(Instance("generate_until", {}, (words(9, 3), {"until": [], "max_gen_toks": 3}), 5))
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked, disable_tqdm=True)
    assert len(set(map(len, found))) > 1 and not any("e" in answer for answer in found[:5])


def test_protocol_03_is_a_sum_of_log_p(both) -> None:
    """By hand: each text tokenized by itself, no BOS, every token of the continuation after those before it."""
    model = both[0]._asked.model
    pairs = [(f"Question: {words(seed, 6)}\nAnswer:", f" {words(seed + 1, 3)}") for seed in range(3)]
    found = HarnessModel(model, "0.3").loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for (context, more), (log_p, _) in zip(pairs, found, strict=True):
        ids, total = model.tokenizer.encode(context), 0.0
        for token in model.tokenizer.encode(more):
            total += model.logits(torch.tensor(ids), (len(ids),))[-1].double().log_softmax(0)[token].item()
            ids.append(token)
        assert log_p == pytest.approx(total, abs=1e-4)


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
