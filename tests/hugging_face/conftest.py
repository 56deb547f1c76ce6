"""Bases of two families, side networks beside them, and the losses of our engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from accessory.config import FinetuneConfig
from accessory.finetuning import finetune
from accessory.hugging_face import QSTConfig, QSTForCausalLM
from tests.conftest import DATA, VOCABULARY, write_tokenizer
from tests.hugging_face.loaded_models import CLASSES, SIDE, loaded
from tests.hugging_face.training import (
    ACCUMULATED,
    CLIP,
    LONGEST,
    LR,
    STEPS,
)


@pytest.fixture(scope="session")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of transformers by family, in fp32."""
    opt = tmp_path_factory.mktemp("tiny_opt")
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, ffn_dim=256, num_attention_heads=4,
        max_position_embeddings=512, word_embed_proj_dim=128, init_std=0.1, bos_token_id=0, eos_token_id=1,
        pad_token_id=1, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(opt)
    write_tokenizer(opt)
    return {"llama": tiny_base, "opt": opt}


@pytest.fixture(scope="session")
def made(bases: dict[str, Path]) -> Callable[..., tuple[QSTForCausalLM, transformers.PreTrainedModel]]:
    """(family, settings) -> a side-tuned model that nobody has trained yet, and the model that it was made of."""

    def make(family: str = "llama", bits: bool = True, **settings) -> tuple:
        theirs = loaded(bases[family], bits)
        return CLASSES[family](theirs, theirs.config, QSTConfig(**{**SIDE, **settings})), theirs

    return make


@pytest.fixture(scope="session")
def engines_losses(bases, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[float]]:
    """Losses of a run of our engine, by family and `tail`."""
    found: dict[tuple[str, int], list[float]] = {}

    def run(family: str, tail: int = 0) -> list[float]:
        if (family, tail) not in found:
            folder = tmp_path_factory.mktemp("run")
            (folder / "qst.json").write_text(json.dumps(SIDE | {"tail": tail}))
            (folder / "data.yaml").write_text(f"META:\n  - path: {DATA}\n    type: text\n")
            config = FinetuneConfig(
                pretrained_path=[bases[family]], data_config=folder / "data.yaml", output_dir=folder / "out",
                llama_type=f"{family}_qst", llama_config=[folder / "qst.json"], quant=True, precision="fp32",
                only_save_trainable=True, device="cpu", batch_size=2, accum_iter=ACCUMULATED, max_steps=STEPS, lr=LR,
                min_lr=LR, warmup_epochs=0, clip_grad=CLIP, weight_decay=0.0, max_words=LONGEST, seed=0,
            )  # fmt: skip
            finetune(config)
            lines = (folder / "out" / "log.jsonl").read_text().splitlines()
            found[family, tail] = [json.loads(line)["loss"] for line in lines]
        return found[family, tail]

    return run
