"""MetaModel: published checkpoints in, logits, losses and scores out, against transformers on tiny random models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from accessory.data.batch import Inset, PackedBatch
from accessory.errors import AccessoryError
from accessory.meta import MetaModel
from accessory.quant.packed import PackedWeight
from tests.meta.byte_models import random_ids

FAMILY = {
    "grouped": {},
    "multi-head, tied": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama3 rope": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 24},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("changes", FAMILY.values(), ids=FAMILY)
def test_logits_equal_transformers(checkpoint, tmp_path: Path, changes: dict) -> None:
    """Two packed documents of every setting of the block, to 1e-4 in fp32."""
    theirs = checkpoint(**changes)
    ours = MetaModel.from_pretrained(tmp_path, dtype="fp32")
    ids = random_ids(40, 17)
    found = ours.logits(ids, (40, 17))
    wanted = torch.cat([theirs(part[None]).logits[0] for part in ids.split((40, 17))])
    assert found.dtype == torch.float32
    assert wanted.std() > 0.3
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def test_mistral_equals_transformers(checkpoint, tmp_path: Path) -> None:
    """The same block under another name."""
    theirs = checkpoint("Mistral", sliding_window=None, head_dim=16)
    ids = random_ids(20)
    found = MetaModel.from_pretrained(tmp_path, dtype="fp32").logits(ids, (20,))
    torch.testing.assert_close(found, theirs(ids[None]).logits[0], rtol=0, atol=1e-4)


def test_loss_is_the_sum_over_supervised_tokens(checkpoint, tmp_path: Path) -> None:
    """Of a packed batch with masked prompts, against transformers' logits and torch's cross-entropy."""
    theirs = checkpoint()
    ours = MetaModel.from_pretrained(tmp_path, dtype="fp32")
    ids, lengths = random_ids(12, 9), (12, 9)
    labels = torch.cat([torch.cat([part[1:], torch.tensor([-100])]) for part in ids.split(lengths)])
    labels[:5] = -100
    batch = PackedBatch(ids, labels, lengths, (0, 1), (0, 0))
    with torch.no_grad():
        logits = torch.cat([theirs(part[None]).logits[0] for part in ids.split(lengths)])
        loss = ours(batch)
    assert batch.supervised == 14
    wanted = F.cross_entropy(logits.double(), labels, reduction="sum")
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_scores_of_choices(checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against float64 over transformers' whole logits, document by document; choices share a context."""
    theirs, ours = checkpoint().double(), MetaModel.from_pretrained(tmp_path, dtype="fp32")
    monkeypatch.setattr("accessory.model.loss.CHUNK", 4)
    context, choices = random_ids(20).tolist(), [random_ids(n).tolist() for n in (3, 1, 7)]
    for _ in range(3):  # what is likeliest after the context
        likely = context + (choices[3] if len(choices) > 3 else [])
        token = int(theirs(torch.tensor([likely])).logits[0, -1].argmax())
        choices[3:] = [[*likely[20:], token]]
    documents = []
    for number, (begin, choice) in enumerate([*((context, choice) for choice in choices), (context[5:9], choices[2])]):
        labels = [-100] * (len(begin) - 1) + choice + [-100]
        documents.append((np.array(begin + choice, np.int32), np.array(labels), number))
    batch = PackedBatch.pack(documents)
    assert len(batch.tokens) == 20 + 3 + 3 + 1 + 7 + 3 + 11  # the context once but for its last token
    found = {score.id: score for score in ours.score(batch)}
    for tokens, labels, number in documents:
        logits, labels = theirs(torch.from_numpy(tokens).long()[None]).logits[0], torch.from_numpy(labels)
        wanted = -F.cross_entropy(logits, labels, reduction="sum").item()
        greedy = bool((logits.argmax(-1) == labels)[labels >= 0].all())
        assert found[number].log_probability == pytest.approx(wanted, rel=1e-5)
        assert found[number][2:] == (int((labels >= 0).sum()), greedy)
    assert [found[number].greedy for number in range(5)] == [False, False, False, True, False]
    assert ours.score(PackedBatch.idle(0)) == []


class Stretched(torch.nn.Module):
    """An encoder of rows whose name is their height."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 64, generator=torch.Generator().manual_seed(1)))
        self.calls: list[int] = []

    def forward(self, names: list[str]) -> list[torch.Tensor]:
        """[3, D] for each name."""
        self.calls.append(len(names))
        return [self.weight * float(name) for name in names]


def test_insets_stand_in_place_of_their_tokens(checkpoint, tmp_path: Path) -> None:
    """Against transformers, given the embeddings document by document; what they begin alike with is computed once."""
    theirs, ours = checkpoint(), MetaModel.from_pretrained(tmp_path, dtype="fp32")
    ours.encoder = Stretched()
    documents = []
    for number, (height, last) in enumerate((("1", 5), ("1", 9), ("-2", 5))):
        tokens = np.array([1, 0, 0, 0, 40, 41, 42, last], np.int32)
        labels = np.array([-100] * 6 + [last, -100])
        held = height if number else ours.encoder.weight.detach().clone()  # by value, and by name
        documents.append((tokens, labels, number, (Inset(1, 3, held),)))
    for named in (documents[:1], documents[1:]):
        batch = PackedBatch.pack(named)
        loss = ours(batch)
        wanted = 0
        for tokens, labels, number, _ in named:
            rows = theirs.get_input_embeddings()(torch.from_numpy(tokens).long())
            rows = torch.cat([rows[:1], *ours.encoder(["-2" if number == 2 else "1"]), rows[4:]])
            logits = theirs(inputs_embeds=rows[None]).logits[0]
            wanted = wanted + F.cross_entropy(logits.double(), torch.from_numpy(labels), reduction="sum")
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    ours_gradient, theirs_gradient = (
        torch.autograd.grad(value, ours.encoder.weight)[0] for value in (loss, wanted)
    )  # fmt: skip
    torch.testing.assert_close(ours_gradient, theirs_gradient, rtol=1e-4, atol=1e-5)
    alone = sum(ours(PackedBatch.pack([document])) for document in documents)
    together = PackedBatch.pack([(*d[:3], (Inset(1, 3, "1" if d[2] < 2 else "-2"),)) for d in documents])
    assert sorted(together.shared) == [0, 1, 6] and len(together.insets) == 2
    ours.encoder.calls.clear()
    assert ours(together).item() == pytest.approx(alone.item(), rel=1e-5)
    assert ours.encoder.calls == [2]  # once for the whole batch


def test_quantized_model_is_near_the_plain_one(checkpoint, tmp_path: Path) -> None:
    """--quant packs every linear of the blocks and nothing else; logits stay correlated, and are not the same."""
    checkpoint()
    plain, packed = (MetaModel.from_pretrained(tmp_path, dtype="fp32", quant=quant) for quant in (None, True))
    names = {name for name, m in packed.named_modules() if isinstance(m, PackedWeight)}
    assert len(names) == 2 * 7
    assert all(name.startswith("llma.layers.") for name in names)
    ids = random_ids(30)
    one, two = plain.logits(ids, (30,)), packed.logits(ids, (30,))
    assert 0.01 < (one - two).std() / one.std() < 0.5


def test_asked_models_are_frozen(model: MetaModel) -> None:
    """No gradients, no dropout."""
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dtype(checkpoint, tmp_path: Path) -> None:
    """bf16 unless said otherwise; norms stay in fp32; an unknown path is an error of ours."""
    checkpoint()
    narrow = MetaModel.from_pretrained(tmp_path)
    assert narrow.llma.layers[0].attention.wq.weight.dtype == torch.bfloat16
    assert narrow.llma.norm.weight.dtype == torch.float32
    with pytest.raises(AccessoryError, match="no such checkpoint"):
        MetaModel.from_pretrained(tmp_path / "absent")


def test_the_device(checkpoint, tmp_path: Path) -> None:
    """By default CUDA where there is any, else the CPU; logits are returned on the device of the tokens."""
    checkpoint()
    place = "cuda" if torch.cuda.is_available() else "cpu"
    assert MetaModel.from_pretrained(tmp_path).llma.norm.weight.device.type == place
    model = MetaModel.from_pretrained(tmp_path, device=torch.device("cpu"))
    assert model.llma.norm.weight.device.type == "cpu"
    assert model.logits(random_ids(3), (3,)).device.type == "cpu"
    if place == "cpu":
        with pytest.raises(AccessoryError, match="--device cuda: PyTorch sees no CUDA device here"):
            MetaModel.from_pretrained(tmp_path, device="cuda:1")
