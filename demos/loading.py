"""Loads a demo's model, over as many ranks as were started."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

from accessory.config import AskConfig, ImageConfig, PageConfig
from accessory.errors import ConfigError
from accessory.meta import MetaModel, Sampling
from accessory.parallel import groups
from accessory.parallel.agree import on_main
from accessory.parallel.groups import Layout
from accessory.parallel.own_ranks import start_own_ranks
from demos.page_serving import check_place

PATIENCE = timedelta(days=3650)  # the other ranks wait for the next question as long as the demo runs


def load(config: AskConfig, page: bool) -> tuple[MetaModel, Layout]:
    """The model, divided over all ranks, and their layout. page: whether one will be served, which is tried first.

    Raises `ConfigError` where a demo that is asked about images has a model that sees none.
    """
    start_own_ranks(config.own_ranks)
    ranks = groups.launch_environment(config.dist_on_itp)[1]
    layout = groups.start(config.device, ranks, config.dist_on_itp, PATIENCE)
    if page and isinstance(config, PageConfig):
        on_main(check_place, config)
    model = MetaModel.from_pretrained(
        list(config.pretrained_path),
        llama_type=config.llama_type,
        llama_config=config.llama_config,
        tokenizer_path=config.tokenizer_path,
        max_seq_len=config.max_seq_len,
        dtype=config.dtype,
        quant=config.quant,
        quant_type=config.quant_type,
        vision_path=config.vision_path,
        with_visual=False if config.no_visual else None,
        layout=layout,
    )
    if isinstance(config, ImageConfig) and model.vision is None:
        raise ConfigError(
            f"--pretrained_path {' '.join(map(str, config.pretrained_path))}: it has no image encoder. "
            "Give one that was trained with images, or an encoder by --vision_path, or use the demos for text."
        )
    return model, layout


def say_seed(config: AskConfig) -> None:
    """Say on stderr by which seed answers are drawn, so that they can be had again; nothing where none is drawn."""
    if config.temperature:
        print(f"answers are drawn by --seed {config.seed}", file=sys.stderr, flush=True)


def sampling_of(config: AskConfig, **others: Any) -> Sampling:
    """How the flags say that answers are chosen, but for `others`. Raises `ConfigError` for values out of range."""
    return Sampling.of(
        **{name: getattr(config, name) for name in Sampling.model_fields if hasattr(config, name)} | others
    )
