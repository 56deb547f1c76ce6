"""A method that makes a decoder of its own: a narrow network beside a base that is only run forward."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from accessory.checkpoint.load import fill
from accessory.config import FinetuneConfig
from accessory.errors import CheckpointError, ParallelError
from accessory.export import Destination, export_adapter, merge
from accessory.finetune import finetune
from accessory.generate import generate_tokens
from accessory.memory.recompute import recompute_layers
from accessory.meta import MetaModel
from accessory.method import METHODS, Attachment, Method
from accessory.model.args import ModelArgs
from accessory.model.block import Block
from accessory.model.cache import LayerCache
from accessory.model.decoder import Decoder, Projection
from accessory.model.position import rotary_frequencies, rotations_at
from accessory.model.sequences import Sequences
from accessory.parallel import groups
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from tests.conftest import ROOT

WIDTH = 16


class SideDecoder(Decoder):
    """Beside each block stands one of WIDTH channels, which reads its output; the last one's is added to the base's."""

    def __init__(self, args: ModelArgs, activation: str, **how: Any) -> None:
        super().__init__(args, **how)
        side = ModelArgs(dim=WIDTH, n_layers=args.n_layers, n_heads=2, hidden_dim=32, activation=activation)
        self.side = nn.ModuleList(Block(side, i, self.ranks, dtype=torch.float32) for i in range(side.n_layers))
        self.down = nn.ModuleList(Projection(args.dim, WIDTH, torch.float32) for _ in self.side)
        self.up = Projection(WIDTH, args.embedding_dim, torch.float32)
        self.register_buffer("side_frequencies", rotary_frequencies(side), persistent=False)
        self.side_width = side.head_dim

    def forward(self, inputs: Tensor, sequences: Sequences, cache: list[LayerCache] | None = None) -> Tensor:
        """As `Decoder.forward`; the base keeps nothing for a backward."""
        with torch.no_grad():
            states = self.states(self.enter(inputs, sequences), sequences, cache)
        mine = replace(sequences, rotations=rotations_at(self.side_frequencies, sequences.positions))
        side = 0
        for i, block in enumerate(self.side):
            with torch.no_grad():
                x = next(states)
            side = block(side + self.down[i](x), mine, cache[len(self.layers) + i] if cache else None)
        with torch.no_grad():
            x = self.leave(x)
        return x + self.up(side)

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """The side's too."""
        for i, base in enumerate(super().blocks()):
            yield from (base, (f"side.{i}", self.side[i]))

    def place(self, device: torch.device) -> None:
        """The side's rotations too."""
        super().place(device)
        self.side_frequencies = self.side_frequencies.to(device)

    def new_cache(self, documents: int, longest: int) -> list[LayerCache]:
        """The side's behind the base's."""
        shape = (documents, longest, 2 // self.ranks, self.side_width)
        mine = [LayerCache(shape, self.dtype, self.frequencies.device) for _ in self.side]
        return super().new_cache(documents, longest) + mine


class Side(Method):
    """Trains what stands beside the base."""

    class Settings(BaseModel):
        """One, which files elsewhere call as the base's is called."""

        model_config = ConfigDict(extra="forbid")
        side_activation: str = "silu"

    @classmethod
    def translated(cls, content: dict[str, Any]) -> dict[str, Any]:
        """Files with a `side` hold the side's keys."""
        return {"side_activation": content["activation"]} if "side" in content else content

    suffix: ClassVar[str] = "_side"
    summary: ClassVar[str] = "a network beside the base"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"side": {}}
    merge_fault: ClassVar[str] = "a network beside the base is no change of its matrices"
    adapter_fault: ClassVar[str] = merge_fault

    def check(self, args: ModelArgs, layout: Layout, data_parallel: str) -> None:
        """Two heads are what the side's blocks have."""
        super().check(args, layout, data_parallel)
        if layout.mp_size > 2:
            raise ParallelError(f"--model_parallel_size {layout.mp_size}: the side network has 2 heads.")

    def decoder(self, args: ModelArgs, **how: Any) -> Decoder:
        """With the side."""
        return SideDecoder(args, self.settings.side_activation, **how)

    def attach(self, decoder: Decoder) -> Attachment:
        """It stands there already."""
        trained = {n: p for n, p in decoder.named_parameters() if n.startswith(("side.", "down.", "up."))}
        return Attachment(set(trained), {name: started(tuple(p.shape)) for name, p in trained.items()})


def started(shape: tuple[int, ...]):
    """Norms at one, matrices at random."""
    return lambda generator: torch.randn(shape, generator=generator) * 0.2 if len(shape) > 1 else torch.ones(shape)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--llama_type llama_side` is a method like others."""
    monkeypatch.setitem(METHODS, "side", Side)


@pytest.fixture
def decoder() -> Iterator[tuple[Decoder, Attachment]]:
    """Filled at random, fp32."""
    layout = groups.start("cpu")
    method = Side(Side.Settings())
    args = ModelArgs(dim=32, n_layers=3, n_heads=2, hidden_dim=48, vocab_size=64)
    made = method.decoder(args, dtype=torch.float32)
    attachment = method.attach(made)
    initial = {name: started(tuple(p.shape)) for name, p in made.named_parameters()}
    fill(made, {}, Attachment(attachment.trainable, initial), layout, DataParallel(layout, "sdp", False))
    yield made, attachment
    groups.stop()


def test_only_the_side_is_gone_back_through(decoder: tuple[Decoder, Attachment]) -> None:
    """Nothing of the base is kept; recomputing every block changes no gradient."""
    made, attachment = decoder
    ids, kept = torch.arange(9), set()
    base = {p.data_ptr() for name, p in made.named_parameters() if name not in attachment.trainable}

    def gradients() -> dict[str, Tensor]:
        made.zero_grad(set_to_none=True)
        made.train()(ids, made.sequences((4, 5))).square().sum().backward()
        return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.add(t.data_ptr()) or t, lambda t: t):
        first = gradients()
    assert set(first) == attachment.trainable and not base & kept
    assert all(gradient.any() for gradient in first.values())
    recompute_layers(made, 6, offload=False, device=torch.device("cpu"))
    assert all(block.recompute for _, block in made.blocks())
    assert all(torch.equal(gradient, first[name]) for name, gradient in gradients().items())


@torch.no_grad()
def test_caches_ride_along(decoder: tuple[Decoder, Attachment]) -> None:
    """Greedy answers step by step are those of whole documents, of prompts that end at different times."""
    made = decoder[0].eval()
    prompts, longest = [[1, 2, 3, 4], [5], [6, 7]], 9
    steps = generate_tokens(made, prompts, max_gen_len=6, max_seq_len=longest, stop_ids=set())
    answers = list(zip(*steps, strict=True))
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([*prompt, *(token for token in answer if token is not None)])
        likeliest = (made(ids, made.sequences((len(ids),))) @ made.head_weight.t()).argmax(-1)
        assert likeliest[len(prompt) - 1 : -1].tolist() == ids[len(prompt) :].tolist()


def test_a_run(known: None, tiny_base: Path, tmp_path: Path) -> None:
    """Trained beside 4 bits, saved, asked; neither merged nor an adapter; refused where its layout will not do."""
    data = tmp_path / "data.yaml"
    data.write_text(f"META:\n  - path: {ROOT / 'data_example' / 'accessory_qa.json'}\n    type: text\n")
    settings = tmp_path / "side.json"
    settings.write_text('{"side": true, "activation": "relu"}')
    config = FinetuneConfig(
        pretrained_path=[tiny_base], data_config=data, output_dir=tmp_path / "out", llama_type="llama_side", quant=True,
        only_save_trainable=True, device="cpu", max_steps=3, lr=1e-2, warmup_epochs=0, max_words=256,
        checkpointing="all", llama_config=[settings],
    )  # fmt: skip
    finetune(config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    (part,) = (tmp_path / "out").glob("epoch*")
    model = MetaModel.from_pretrained(part)
    assert (model.llma.side[0].feed_forward.activation, model.llma.layers[0].feed_forward.activation) == (
        "relu",
        "silu",
    )
    assert len(model.generate(["What is it?"], max_gen_len=4)) == 1
    with pytest.raises(CheckpointError, match="cannot be merged: it is a llama_side, a network beside the base"):
        merge([tiny_base, part], tmp_path / "merged", Destination(), base=None, drop_biases=False)
    with pytest.raises(CheckpointError, match="it is a llama_side, a network beside the base"):
        export_adapter([tiny_base, part], tmp_path / "adapter", drop_biases=False)
    with pytest.raises(ParallelError, match="--model_parallel_size 4: the side network has 2 heads"):
        Side(Side.Settings()).check(ModelArgs(n_heads=4, hidden_dim=16), Layout(world_size=4, mp_size=4), "sdp")
