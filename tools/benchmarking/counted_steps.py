"""Training steps on a pretended GPU, as the engine makes them, and what they ask a GPU for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from accessory.blueprint import DTYPES, Blueprint
from accessory.checkpoint.source import Source
from accessory.checkpoint.training_state import Progress
from accessory.engine import Engine
from accessory.method import Attachment
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.families import architecture_of
from accessory.parallel.groups import Layout
from accessory.parallel.tensor import slicing_of
from accessory.run.report import Reporter, StepReport
from tools.benchmarking.launches import Counts, LaunchCounter
from tools.benchmarking.pretended_gpu import pretended
from tools.benchmarking.training import METHODS, Training

GPU = torch.device("cuda", 0)
TINY = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
GATED = TINY | {"intermediate_size": 256, "num_key_value_heads": 2, "max_position_embeddings": 512}
CONFIGS = {
    "llama": ("llama", GATED),
    "opt": ("opt", TINY | {"ffn_dim": 256, "word_embed_proj_dim": 128, "max_position_embeddings": 512}),
    "bloom": ("bloom", TINY | {"n_layer": 1, "n_head": 4}),
    "neox": ("gpt_neox", GATED | {"rotary_pct": 0.25}),
    "glm": ("glm", GATED | {"head_dim": 32, "rms_norm_eps": 1e-5, "attention_bias": True}),
}
"""Family -> (its model type, the config.json of a tiny model)."""


class _RealShapes(Blueprint):
    """A blueprint that builds its decoder on the real meta device, where parameters can be cast in place."""

    def build(self, layout: Layout, data_parallel: str = "sdp") -> tuple[Decoder, Attachment]:
        """See `Blueprint.build`."""
        with unset_fake_temporarily():
            return super().build(layout, data_parallel)


@dataclass(frozen=True)
class PretendedTraining(Training):
    """A training run of a model with the settings `args`, whose weights are fake tensors."""

    args: ModelArgs | None = None

    def engine(self, layout: Layout) -> Engine:
        """The engine of a run on a GPU, whose micro-batches come from pinned memory."""
        made = super().engine(layout)
        made.settings = replace(made.settings, pin_memory=True)
        return made

    def _blueprint(self, layout: Layout) -> tuple[Blueprint, list[Source]]:
        family = architecture_of(self.args.architecture, "args").family
        llama_type, method = family + METHODS[self.method].suffix, self._method([])
        made = _RealShapes(llama_type, self.args, method, self.quant_type, DTYPES[self.precision], None, train=True)
        return made, []

    def _fill(self, decoder: Decoder, attachment: Attachment, *_rest: Any) -> None:
        decoder.place(GPU)
        for prefix, module in decoder.named_modules():
            for leaf, place in list(module._parameters.items()):
                if place is not None:
                    made = torch.empty(place.shape, dtype=place.dtype, device=GPU)
                    trained = f"{prefix}.{leaf}" in attachment.trainable
                    parameter = nn.Parameter(made, requires_grad=trained)
                    parameter.slicing = slicing_of(place)
                    setattr(module, leaf, parameter)


def tiny_args(family: str) -> ModelArgs:
    """Settings of a tiny model of a family."""
    name, config = CONFIGS[family]
    return architecture_of(name, family).read(config, family)


def counted_step(
    args: ModelArgs,
    method: str,
    quant_type: str | None,
    *,
    triton: bool,
    documents: int = 4,
    seq: int = 64,
    optim: str = "adamw",
    checkpointing: int | str = 0,
) -> LaunchCounter:
    """What a run's step asks a GPU for; all tokens are learned. It needs `groups.start`.

    It counts what happens between the reports of two steps. The first step is left out, because it allocates the
    optimizer's state and fills caches, and the last one, because its numbers are read at once.
    """
    training = PretendedTraining(
        model="", data=None, steps=3, batch_size=documents, seq=(seq,), supervised=1.0, max_words=seq, method=method,
        rank=None, adapter=None, quant_type=quant_type, precision="bf16", lr=1e-4, optim=optim,
        checkpointing=checkpointing, share_prefixes=False, args=args,
    )  # fmt: skip
    with pretended(triton):
        engine = training.engine(Layout(device=GPU))
        counter = LaunchCounter()
        engine.reporter = Between(counter)
        with counter, counter.watch(engine.model):
            engine.train(Progress())
    counter.found = engine.reporter.found
    return counter


class Between(Reporter):
    """Keeps what was counted between the reports of the first two steps."""

    def __init__(self, counter: LaunchCounter) -> None:
        super().__init__(None, 0, 0, enabled=False)
        self.counter, self.found = counter, {}

    def step(self, report: StepReport) -> None:
        """Begin to count at the first report, and end at the second."""
        if report.step == 1:
            self.counter.clear()
        elif report.step == 2:
            self.found = dict(self.counter.found)


def extra(args: ModelArgs, method: str, quant_type: str | None, **how: Any) -> dict[tuple[str, str], Counts]:
    """What one block more asks for, by phase and operation: the difference of two depths. how: as `counted_step`."""
    one, two = (
        counted_step(args.model_copy(update={"n_layers": depth}), method, quant_type, **how).found for depth in (1, 2)
    )
    return {key: two.get(key, Counts()) - one.get(key, Counts()) for key in one | two}
