"""A tiny model learns to answer questions about pictures that it has not seen, and only by looking at them.

Its encoder is a small BLIP-2, taught first to tell colours, shapes and counts apart, in plain torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from accessory import MetaModel
from accessory.config import FinetuneConfig
from accessory.data.pictures import MEAN, STD
from accessory.finetuning import finetune
from tests.conftest import TINY_CONFIG, write_model, write_tokenizer
from tests.vision.drawings import ANSWERS, QUESTIONS, SIDE, Drawing

transformers = pytest.importorskip("transformers", reason="the extra vision is not installed")
WIDTH = 64
TRAINED, HELD_OUT = 1000, 100
CHANCE = sum(1 / len(answers) for answers in ANSWERS) / len(ANSWERS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Two that wait for each other take much longer for so small matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pixels(drawings: list[Drawing]) -> Tensor:
    """What an encoder is given of them, fp32 [n, 3, SIDE, SIDE]."""
    images = torch.stack([torch.from_numpy(np.array(drawing.image())) for drawing in drawings])
    return ((images / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BLIP-2 directory whose queries find what colour, shape and how many."""
    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 2}
    config = transformers.Blip2Config(
        vision_config={**size, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": 14},
        qformer_config={**size, "num_hidden_layers": 1, "cross_attention_frequency": 1, "vocab_size": 8,
                        "max_position_embeddings": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        text_config={"model_type": "opt", "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "vocab_size": 8,
                     "num_attention_heads": 1, "word_embed_proj_dim": 8, "max_position_embeddings": 4},
        num_query_tokens=4,
    )  # fmt: skip
    model = transformers.Blip2Model(config)
    nn.init.normal_(model.query_tokens, std=0.5)
    drawings = [Drawing(seed) for seed in range(3000)]
    teach(model, pixels(drawings), torch.tensor([drawing.classes for drawing in drawings]), steps=700)
    directory = tmp_path_factory.mktemp("eyes")
    model.save_pretrained(directory)
    return directory


def teach(model: nn.Module, images: Tensor, classes: Tensor, steps: int, rate: float = 3e-3) -> None:
    """Train all of an encoder as a classifier: `images` [n, 3, SIDE, SIDE], `classes` int64 [n, 3]."""
    counts = [len(answers) for answers in ANSWERS]
    head = nn.Linear(WIDTH, sum(counts))
    parts = (model.vision_model, model.qformer, head)
    parameters = [model.query_tokens, *(parameter for part in parts for parameter in part.parameters())]
    optimizer = torch.optim.AdamW(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        some = torch.randint(len(images), (64,))
        seen = model.vision_model(images[some]).last_hidden_state
        queries = model.query_tokens.expand(len(seen), -1, -1)
        found = head(model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state.mean(1))
        losses = map(nn.functional.cross_entropy, found.split(counts, 1), classes[some].unbind(1))
        optimizer.zero_grad()
        sum(losses).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The YAML of pictures in files and a record for each question about each."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "pictures").mkdir()
    records = [
        {"image": name, "instruction": question, "output": answer}
        for drawing in map(Drawing, range(10_000, 10_000 + TRAINED))
        for name in [drawing.save(folder / "pictures")]
        for question, answer in zip(QUESTIONS, drawing.answers, strict=True)
    ]
    (folder / "records.json").write_text(json.dumps(records))
    entry = "META:\n  - path: records.json\n    type: image_text\n    root: pictures\n    prompt_type: none\n"
    (folder / "data.yaml").write_text(entry)
    return folder / "data.yaml"


@pytest.fixture(scope="module")
def trained(eyes: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> MetaModel:
    """The model that `finetune` leaves, read back from its last checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    base, output = folder / "base", folder / "output"
    base.mkdir()
    write_model(base, TINY_CONFIG | {"hidden_size": 64, "intermediate_size": 128})
    write_tokenizer(base)
    finetune(
        FinetuneConfig(
            pretrained_path=base, vision_path=eyes, llama_type="llama_qformerv2", data_config=data, output_dir=output,
            image_transform="resized_center_crop", cache_features=folder / "features", device="cpu", precision="fp32",
            batch_size=64, accum_iter=1, max_words=64, epochs=5, warmup_epochs=1, lr=3e-3, weight_decay=0,
            clip_grad=1, save_interval=5, report_to="none",
        )
    )  # fmt: skip
    return MetaModel.from_pretrained([output / "epoch4"], device="cpu", dtype="fp32")


def test_pictures_that_were_not_trained_on_are_answered(trained: MetaModel) -> None:
    """95 % word for word; with another picture, or none, it is no better than chance."""
    drawings = [Drawing(seed) for seed in range(20_000, 20_000 + HELD_OUT)]
    prompts = list(QUESTIONS) * HELD_OUT
    expected = [answer for drawing in drawings for answer in drawing.answers]

    def share(seen: list[Drawing] | None) -> float:
        """How many answers are right where these are looked at."""
        images = None if seen is None else [drawing.image() for drawing in seen for _ in QUESTIONS]
        how = {"image_transform": "resized_center_crop", "max_gen_len": 8, "temperature": 0}
        found = trained.generate(prompts, images, **how)
        right = [answer.strip() == wanted for answer, wanted in zip(found, expected, strict=True)]
        return sum(right) / len(right)

    assert share(drawings) >= 0.95
    for others in ([*drawings[1:], drawings[0]], None):
        assert share(others) < CHANCE + 0.12
