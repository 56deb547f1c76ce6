"""Side tuning: numbers are those of the formulas, it starts where it says, nothing goes back through the base."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from accessory.checkpoint.load import fill, targets
from accessory.config import FinetuneConfig
from accessory.data.batch import IGNORE, Document, PackedBatch
from accessory.errors import CheckpointError, ConfigError, ParallelError
from accessory.export import Destination, export_adapter, merge
from accessory.finetuning import finetune
from accessory.generate import generate_tokens
from accessory.memory.plan import parameter_counts
from accessory.memory.recompute import recompute_layers
from accessory.meta import MetaModel
from accessory.method import METHODS, Attachment
from accessory.method.side_network import SideDecoder
from accessory.method.side_settings import side_args
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum
from accessory.parallel import groups
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from tests.checkpoint.trained import write_trained_side
from tests.conftest import ROOT, TINY_CONFIG, write_model, write_tokenizer
from tests.method import side_reference

LLAMA = {"dim": 64, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 96, "vocab_size": 61,
         "rotary_layout": "halves"}  # fmt: skip
OPT = {"architecture": "opt", "dim": 64, "n_layers": 3, "n_heads": 4, "hidden_dim": 128, "vocab_size": 61,
       "norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "position": "learned", "gated": False,
       "position_offset": 2, "activation": "relu", "tie_word_embeddings": True, "max_seq_len": 32}  # fmt: skip
LENGTHS = (7, 1, 5)


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """One process."""
    yield groups.start("cpu")
    groups.stop()


def made(args: dict, layout: Layout, /, untrained: bool = False, **settings) -> tuple[SideDecoder, Attachment]:
    """A decoder in fp32, its base at random, its side as it starts (`untrained`) or at random too."""
    method = METHODS["qst"](METHODS["qst"].Settings(**settings))
    decoder = method.decoder(ModelArgs(**args), dtype=torch.float32)
    attachment = method.attach(decoder)
    makers = {t.name: at_random(t.name, t.whole_shape(1)) for t in targets(decoder)}
    if untrained:
        makers |= attachment.initial
    fill(decoder, {}, Attachment(attachment.trainable, makers), layout, DataParallel(layout, "sdp", False))
    return decoder.train(), attachment


def at_random(name: str, shape: tuple[int, ...]):
    """A maker of values: norms near one, matrices that neither grow nor shrink what they multiply."""
    if len(shape) == 1:
        return lambda generator: 0.2 * torch.randn(shape, generator=generator) + ("norm" in name and "weight" in name)
    return lambda generator: torch.randn(shape, generator=generator) / shape[1] ** 0.5


def drawn(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and labels of documents of LENGTHS."""
    generator = torch.Generator().manual_seed(seed)
    ids, labels = (torch.randint(0, 61, (sum(LENGTHS),), generator=generator) for _ in range(2))
    labels[::4] = -100
    return ids, labels


VARIANTS = [
    {}, {"start": "released"}, {"downsample": "lora", "gate": "scalar"}, {"downsample": "linear", "side_layers": 2},
    {"downsample": "avgpool", "embedding_downsample": "own"}, {"downsample": "maxpool", "start": "released"},
    {"add_layer_norm_before_adapter": True, "add_layer_norm_after_adapter": False, "adapter_activation": "gelu"},
    {"embedding_downsample": "own", "side_heads": 2, "r": 2}, {"tail": 1, "tail_rank": 3},
    {"tail": 3, "side_layers": 0, "tail_rank": 3, "tail_backward": "all"},
    {"tail": 3, "side_layers": 0, "label_share": 0.4},
]  # fmt: skip


@pytest.mark.parametrize("family", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_numbers_are_those_of_the_formulas(family: dict, settings: dict, layout: Layout) -> None:
    """Logits and every gradient, of documents packed end to end, beside float64 one document at a time."""
    decoder, attachment = made(family, layout, **{"r": 4, "label_share": 1, **settings})
    ids, labels = drawn()
    learned, weights, _ = decoder.learned(labels, None, (labels >= 0).nonzero()[:, 0])
    hidden = decoder(ids, decoder.sequences(LENGTHS).with_labels(learned))
    loss = cross_entropy_sum(hidden, decoder.head_weight, learned, weights=weights)
    loss.backward()
    given = {name: p.detach().double() for name, p in decoder.named_parameters()}
    for name in attachment.trainable:
        given[name].requires_grad_()
    narrow = decoder.side_args.model_dump() if decoder.side else {}
    shapes = decoder.args.model_dump(), narrow, decoder.settings.model_dump()
    parts = zip(ids.split(LENGTHS), learned.split(LENGTHS), strict=True)
    expected = torch.cat([side_reference.logits(given, part, its >= 0, *shapes) for part, its in parts])
    times = (labels >= 0).sum() / (learned >= 0).sum()
    (times * torch.nn.functional.cross_entropy(expected, learned, reduction="sum")).backward()
    ours = (hidden @ decoder.head_weight.t()).double()
    assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()
    for name, parameter in decoder.named_parameters():
        if name in attachment.trainable:
            want = given[name].grad
            scale = max(want.abs().max(), 1e-2)  # a bias of keys changes no softmax: its gradient is zero
            assert (parameter.grad - want).abs().max() <= 1e-5 * scale, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(
    ("shape", "millions"),
    [
        ({"dim": 4096, "n_layers": 32, "n_heads": 32, "hidden_dim": 11008}, 28.62),
        ({"dim": 5120, "n_layers": 40, "n_heads": 40, "hidden_dim": 13824}, 54.76),
        ({"dim": 8192, "n_layers": 80, "n_heads": 64, "n_kv_heads": 8, "hidden_dim": 28672}, 282.9),
        (OPT | {"dim": 2048, "n_layers": 24, "n_heads": 32, "hidden_dim": 8192}, 5.86),
        (OPT | {"dim": 2560, "n_layers": 32, "n_heads": 32, "hidden_dim": 10240}, 11.71),
        (OPT | {"dim": 4096, "n_layers": 32, "n_heads": 32, "hidden_dim": 16384}, 28.57),
        (OPT | {"dim": 9216, "n_layers": 64, "n_heads": 72, "hidden_dim": 36864}, 270.7),
    ],
)
def test_counts_are_the_papers(shape: dict, millions: float) -> None:
    """Of the released form: LLaMA-2 7B, 13B, 70B, OPT 1.3B, 2.7B, 6.7B, 66B."""
    method = METHODS["qst"](METHODS["qst"].Settings(start="released"))
    decoder = method.decoder(ModelArgs(**{"vocab_size": 32000, **shape}), dtype=torch.bfloat16)
    trained, _ = parameter_counts(decoder, method.attach(decoder))
    assert round(trained / 1e6, 1 if millions > 100 else 2) == millions


@pytest.mark.parametrize("family", [LLAMA, OPT], ids=["llama", "opt"])
@pytest.mark.parametrize("tail", [0, 1])
def test_untrained_it_is_its_base(family: dict, tail: int, layout: Layout) -> None:
    """To the bit, in training and in answers; the released form is not."""
    decoder, _ = made(family, layout, untrained=True, r=4, dropout=0.1, tail=tail)
    base = Decoder(ModelArgs(**family), dtype=torch.float32)
    held = {name: at_random(name, t.whole_shape(1)) for t in targets(base) for name in [t.name]}
    fill(base, {}, Attachment(set(), held), layout, DataParallel(layout, "sdp", False))
    ids, _ = drawn()
    assert torch.equal(decoder(ids, decoder.sequences(LENGTHS)), base(ids, base.sequences(LENGTHS)))
    how = {"prompts": [[3, 4, 5], [6]], "max_gen_len": 6, "max_seq_len": 16, "stop_ids": set()}
    assert list(generate_tokens(decoder.eval(), **how)) == list(generate_tokens(base.eval(), **how))
    released, _ = made(family, layout, untrained=True, r=4, start="released")
    assert not torch.allclose(released(ids, released.sequences(LENGTHS)), base(ids, base.sequences(LENGTHS)), atol=0.1)


@pytest.mark.parametrize("start", ["base", "released"])
@pytest.mark.parametrize("gate", ["vector", "scalar"])
def test_everything_is_trained(start: str, gate: str, layout: Layout) -> None:
    """Three steps move every parameter, the gates among them; dropout makes two forwards differ."""
    tail = int(start == "base")
    decoder, attachment = made(LLAMA, layout, untrained=True, r=4, start=start, gate=gate, dropout=0.5, tail=tail)
    parameters = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.Adam(parameters.values(), 1e-2)
    ids, labels = drawn()
    for _ in range(3):
        hidden = decoder(ids, decoder.sequences(LENGTHS))
        cross_entropy_sum(hidden, decoder.head_weight, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all((p != before[name]).any() for name, p in parameters.items())
    one, other = (decoder(ids, decoder.sequences(LENGTHS)) for _ in range(2))
    assert not torch.equal(one, other)
    decoder.eval()
    one, other = (decoder(ids, decoder.sequences(LENGTHS)) for _ in range(2))
    assert torch.equal(one, other)


def test_dropout_has_the_gradient_of_its_mask(layout: Layout) -> None:
    """The mask of the forward is drawn again in the backward: gradients are those of finite differences."""
    decoder, _ = made(LLAMA, layout, r=4, dropout=0.3)
    weight, (ids, labels) = decoder.downsample[1].a.weight, drawn()

    def loss() -> Tensor:
        torch.manual_seed(5)
        return cross_entropy_sum(decoder(ids, decoder.sequences(LENGTHS)), decoder.head_weight, labels)

    loss().backward()
    direction = torch.randn_like(weight)
    with torch.no_grad():
        ahead, behind = (weight.add_(direction, alpha=by) is weight and loss() for by in (1e-3, -2e-3))
    slope = (weight.grad * direction).sum()
    assert (ahead - behind) / 2e-3 == pytest.approx(slope.item(), rel=1e-2)


def test_shared_beginnings_are_those_of_documents_alone(layout: Layout) -> None:
    """A prefix that documents share is computed once, with the same loss and gradients."""
    decoder, attachment = made(LLAMA, layout, r=4)
    prefix = list(range(12))
    documents = [Document(torch.tensor([*prefix, *own]).numpy(),
                          torch.tensor([-100] * 11 + [*own, 9]).numpy(), i)
                 for i, own in enumerate(([20, 21, 22], [30, 31], [40, 41, 42, 43]))]  # fmt: skip

    def result(batch: PackedBatch) -> list[Tensor]:
        decoder.zero_grad(set_to_none=True)
        hidden = decoder(batch.tokens, decoder.sequences(batch.lengths, shared=batch.shared))
        loss = cross_entropy_sum(hidden, decoder.head_weight, batch.labels)
        loss.backward()
        return [loss.detach(), *(p.grad for name, p in decoder.named_parameters() if name in attachment.trainable)]

    together, alone = (result(PackedBatch.pack(documents, share=share)) for share in (True, False))
    assert any(PackedBatch.pack(documents).shared)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_nothing_of_the_base_is_kept(layout: Layout) -> None:
    """Of a base state only what a downsample reads is; recomputing every block changes no gradient."""
    decoder, attachment = made(LLAMA, layout, r=4)
    ids, _ = drawn()
    base, kept = {p.data_ptr() for name, p in decoder.named_parameters() if name not in attachment.trainable}, []

    def gradients() -> dict[str, Tensor]:
        decoder.zero_grad(set_to_none=True)
        decoder(ids, decoder.sequences(LENGTHS)).square().sum().backward()
        return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}

    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        first = gradients()
    assert set(first) == attachment.trainable and not base & {t.data_ptr() for t in kept}
    wide = {t.data_ptr() for t in kept if t.shape == (sum(LENGTHS), 64)}
    assert len(wide) == len(decoder.side) + 3  # embedding, each block's, the upsample's for its gate, and the result
    recompute_layers(decoder, 6, offload=False, device=torch.device("cpu"))
    assert [name for name, block in decoder.blocks() if block.recompute] == [
        name for i in range(3) for name in (f"layers.{i}", f"side.{i}")
    ]
    assert all(torch.equal(gradient, first[name]) for name, gradient in gradients().items())


@pytest.mark.parametrize("downsample", ["adapter", "lora", "linear"])
def test_states_kept_in_8_bits(downsample: str, layout: Layout) -> None:
    """The forward and all gradients but those of first matrices are exact; nothing wide is kept but int8."""
    (ids, labels), kept, found = drawn(), [], []
    for bits in (16, 8):
        decoder, attachment = made(LLAMA, layout, r=4, downsample=downsample, state_bits=bits)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            hidden = decoder(ids, decoder.sequences(LENGTHS))
        loss = cross_entropy_sum(hidden, decoder.head_weight, labels)
        loss.backward()
        found.append({name: p.grad for name, p in decoder.named_parameters() if name in attachment.trainable})
        wide = {t.data_ptr() for t in kept if t.is_floating_point() and t.numel() == sum(LENGTHS) * 64}
        assert len(wide) == (len(decoder.side) + 2 if bits == 16 else 1)  # the upsample's result, for its gate
        kept.clear()
    first = {"adapter": ".a.", "lora": ".a.", "linear": ".weight."}[downsample]
    for name, exact in found[0].items():
        error = (found[1][name] - exact).norm() / exact.norm()
        reads = name.startswith("downsample.") and first in name
        assert (0 < error < 0.02) if reads else torch.equal(found[1][name], exact), name


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_state_kept_in_8_bits_is_freed(layout: Layout, dropout: float) -> None:
    """Nothing else holds the state for the backward, such as the function that makes it again."""
    decoder, _ = made(LLAMA, layout, r=4, state_bits=8, dropout=dropout)
    state = torch.randn(5, decoder.args.dim)
    alive = weakref.ref(state)
    read = decoder.train().downsample[0](state)
    del state
    assert alive() is None
    read.sum().backward()


def test_pools_keep_no_state(layout: Layout) -> None:
    """They have no weights, so nothing as wide as the base is saved beside them."""
    decoder, _ = made(LLAMA, layout, r=4, downsample="avgpool")
    ids, _ = drawn()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        decoder(ids, decoder.sequences(LENGTHS))
    assert len({t.data_ptr() for t in kept if t.shape == (sum(LENGTHS), 64)}) == 1  # the upsample's result


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"side_layers": 2, "start": "released"}, {"tail": 1}], ids=str)
def test_caches_ride_along(settings: dict, layout: Layout) -> None:
    """Greedy answers step by step are those of whole documents, of prompts that end at different times."""
    decoder, _ = made(LLAMA, layout, r=4, **settings)
    prompts = [[1, 2, 3, 4], [5], [6, 7]]
    steps = generate_tokens(decoder.eval(), prompts, max_gen_len=6, max_seq_len=9, stop_ids=set())
    for prompt, answer in zip(prompts, zip(*steps, strict=True), strict=True):
        ids = torch.tensor([*prompt, *(token for token in answer if token is not None)])
        likeliest = (decoder(ids, decoder.sequences((len(ids),))) @ decoder.head_weight.t()).argmax(-1)
        assert likeliest[len(prompt) - 1 : -1].tolist() == ids[len(prompt) :].tolist()


def test_heads_are_wide_unless_released() -> None:
    """By default attention's cost, which goes by heads, falls with the width."""
    seven, small = ModelArgs(), ModelArgs(dim=576, n_heads=9, n_kv_heads=3, hidden_dim=1536)
    settings = METHODS["qst"].Settings
    ways = {"side_layers": 1}, {"start": "released"}
    shapes = [side_args(args, settings(**how)) for args in (seven, small) for how in ways]
    assert [(s.n_heads, s.n_kv_heads, s.head_dim) for s in shapes] == [(8, 8, 32), (32, 32, 8), (1, 1, 36), (9, 3, 4)]


def test_which_form_settings_make() -> None:
    """Two fifths of the blocks where nothing is said; any key of a side network makes one, without a tail."""
    settings = METHODS["qst"].Settings
    forms = [
        settings(**how) for how in ({}, {"r": 8}, {"tail": 2}, {"tail": 2, "gate": "scalar"}, {"start": "released"})
    ]
    assert [(s.side_layers, s.tail_of(30)) for s in forms] == [(0, 12), (1, 0), (0, 2), (1, 2), (1, 0)]
    assert [form.label_share for form in forms] == [0.5, 0.5, 0.5, 0.5, 1]
    assert all(settings(**form.model_dump()) == form for form in forms)
    assert settings().tail_of(2) == 1 and settings(tail=0).side_layers == 1
    with pytest.raises(ValueError, match="nothing would be trained"):
        settings(tail=0, side_layers=0)


def test_a_share_of_the_labels_is_drawn(layout: Layout) -> None:
    """Anew each time, from the generator that a resumed run restores; a trained model is scored by all of them."""
    decoder, _ = made(LLAMA, layout, tail=1, label_share=0.3)
    _, labels = drawn()
    given, labelled = torch.rand(len(labels)), int((labels >= 0).sum())
    places = (labels >= 0).nonzero()[:, 0]
    state = torch.get_rng_state()
    draws = [decoder.learned(labels, None, places) for _ in range(400)]
    torch.set_rng_state(state)
    again, weights, _ = decoder.learned(labels, given, places)
    count = math.ceil(0.3 * labelled)
    assert torch.equal(again, draws[0][0]) and torch.equal(weights, given * (labelled / count))
    for learned, weights, drawn_places in draws:
        rows = learned >= 0
        assert torch.equal(drawn_places, rows.nonzero()[:, 0])
        assert rows.sum() == count and torch.equal(learned[rows], labels[rows])
        assert (weights == torch.tensor(labelled / count)).all()
    often = sum((learned >= 0).double() for learned, *_ in draws)[labels >= 0] / len(draws)
    assert (often - count / labelled).abs().max() < 0.12  # 5 standard deviations
    assert decoder.eval().learned(labels, None, places)[0] is labels
    unlabelled = torch.full_like(labels, IGNORE)
    assert torch.equal(decoder.train().learned(unlabelled, None, places[:0])[0], unlabelled)


def test_widths_that_cannot_be() -> None:
    """The keys to change and values that do are named."""
    args, settings = ModelArgs(dim=64, n_heads=4, hidden_dim=96), METHODS["qst"].Settings
    with pytest.raises(
        ConfigError,
        match=r"r 16 makes a side network of 4 channels, .* 4 heads of an even width. An r that does: 8, 4, 2",
    ):
        side_args(args, settings(start="released"))
    method = METHODS["qst"](settings(r=4, side_heads=1))
    with pytest.raises(ParallelError, match="--model_parallel_size 2 does not divide the side network's 1 attention"):
        method.check(args, Layout(world_size=2, mp_size=2), "sdp")


@pytest.mark.parametrize(("how", "most"), [({"tail": 4}, 3), ({"tail": 3, "r": 4}, 2)], ids=str)
def test_a_tail_longer_than_the_base(how: dict, most: int) -> None:
    """A side network needs a block before it."""
    method = METHODS["qst"](METHODS["qst"].Settings(**how))
    with pytest.raises(ConfigError, match=f"'tail' is {how['tail']}, the base has 3 blocks; expected {most} or less"):
        method.check(ModelArgs(**LLAMA), Layout(), "sdp")
    shorter = METHODS["qst"](METHODS["qst"].Settings(**how | {"tail": most}))
    shorter.check(ModelArgs(**LLAMA), Layout(), "sdp")


def test_published_keys() -> None:
    """Files of the published code call the adapter's activation as the base's is called."""
    theirs = {"r": 8, "alpha_r": 16, "activation": "swish", "peft_hidden_size": 16, "dropout": 0.1}
    ours = METHODS["qst"].Settings(**METHODS["qst"].translated(theirs))
    assert (ours.r, ours.adapter_activation, ours.dropout) == (8, "silu", 0.1)
    assert METHODS["qst"].translated({"activation": "relu"}) == {"activation": "relu"}


def test_a_tail_alone_is_merged(tiny_base: Path, tmp_path: Path) -> None:
    """It is LoRA in the last blocks: merged, or as a PEFT adapter of these blocks, it answers as it was trained."""
    config = FinetuneConfig(
        pretrained_path=[tiny_base], data_config=ROOT / "data_example" / "accessory_qa.json", llama_type="llama_qst",
        output_dir=tmp_path / "out", only_save_trainable=True, device="cpu", precision="fp32", max_steps=3, lr=1e-2,
        warmup_epochs=0, max_words=160,
    )  # fmt: skip
    finetune(config)
    (part,) = (tmp_path / "out").glob("epoch*")
    assert json.loads((part / "config.json").read_text())["tail"] == 1
    merge([tiny_base, part], tmp_path / "merged", Destination(dtype="fp32"), base=None, drop_biases=False)
    export_adapter([tiny_base, part], tmp_path / "adapter", drop_biases=False)
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stated["layers_to_transform"], stated["r"], stated["lora_alpha"]) == ([1], 16, 16)
    ways = [part], [tmp_path / "merged"], [tiny_base, tmp_path / "adapter"], [tiny_base]
    trained, *same, base = (
        MetaModel.from_pretrained(way, dtype="fp32").logits(torch.arange(9) + 40, (9,)) for way in ways
    )
    for found in same:
        torch.testing.assert_close(found, trained, rtol=0, atol=1e-5)
    assert (trained - base).abs().max() > 1e-2


def test_parts_of_versions_that_recorded_null(tmp_path: Path) -> None:
    """Their tail was a fifth of the blocks: its tensors tell. Side heads follow from the base."""
    base = tmp_path / "base"
    base.mkdir()
    write_model(base, {**TINY_CONFIG, "num_hidden_layers": 5})
    write_tokenizer(base)
    tail = write_trained_side(base, tmp_path / "tail", tail=1)
    side = write_trained_side(base, tmp_path / "side", r=2)
    for part, key, trained, other in ((tail, "tail", 1, 2), (side, "side_heads", 2, 1)):
        expected = logits_beside(base, part)
        stated = json.loads((part / "config.json").read_text())
        (part / "config.json").write_text(json.dumps(stated | {key: None}))
        assert torch.equal(logits_beside(base, part), expected)
        with pytest.raises(ConfigError, match=f"was trained with {key} {trained}, here it is {other}"):
            logits_beside(base, part, llama_config={key: other})


def logits_beside(base: Path, part: Path, **how) -> Tensor:
    """Of a few tokens."""
    return MetaModel.from_pretrained([base, part], dtype="fp32", device="cpu", **how).logits(torch.arange(9), (9,))


def test_a_run(tiny_base: Path, tmp_path: Path) -> None:
    """Trained beside 4 bits, saved, asked; neither merged nor an adapter."""
    data = tmp_path / "data.yaml"
    data.write_text(f"META:\n  - path: {ROOT / 'data_example' / 'accessory_qa.json'}\n    type: text\n")
    settings = tmp_path / "qst.json"
    settings.write_text('{"r": 4, "alpha_r": 4, "peft_hidden_size": 8, "activation": "swish"}')
    config = FinetuneConfig(
        pretrained_path=[tiny_base], data_config=data, output_dir=tmp_path / "out", llama_type="llama_qst", quant=True,
        only_save_trainable=True, device="cpu", max_steps=3, lr=1e-2, warmup_epochs=0, max_words=256,
        checkpointing="all", llama_config=[settings],
    )  # fmt: skip
    finetune(config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    (part,) = (tmp_path / "out").glob("epoch*")
    model = MetaModel.from_pretrained(part)
    stated = json.loads((part / "config.json").read_text())
    assert (stated["side_layers"], stated["tail"], stated["side_heads"], stated["label_share"]) == (1, 0, 1, 0.5)
    assert model.llma.settings.r == 4 and len(model.generate(["What is it?"], max_gen_len=4)) == 1
    with pytest.raises(CheckpointError, match="cannot be merged: it is a llama_qst, a side network stands beside"):
        merge([tiny_base, part], tmp_path / "merged", Destination(), base=None, drop_biases=False)
    with pytest.raises(CheckpointError, match="it is a llama_qst, a side network stands beside the base"):
        export_adapter([tiny_base, part], tmp_path / "adapter", drop_biases=False)
