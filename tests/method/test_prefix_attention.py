"""Attention to a learned prefix against its formula in float64, and against peft's; two ranks are in test_ranks.py."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import Tensor

from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.generate import generate_tokens
from accessory.method import METHODS, Attachment, prefix_attention
from accessory.model import linear as linear_module
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.linear import Linear
from accessory.parallel.data import DataParallel
from accessory.parallel.groups import Layout
from accessory.quant import storage

Adapter = METHODS["adapter"]
ARGS = ModelArgs(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, hidden_dim=80, vocab_size=96, max_seq_len=64)
SETTINGS = {"prefix_layers": 2, "prefix_len": 3, "lora_rank": 4, "use_prefix_new_gate": True}
LAYER = {"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True}
SHAPES = {
    "grouped heads": {},
    "one key/value head": {"n_kv_heads": 1},
    "rotated halves, a window": {"rotary_layout": "halves", "sliding_window": 2},
    "normalized heads": {"qk_norm": True},
    "learned positions": LAYER | {"position": "learned", "embedding_dim": 24, "norm_placement": "after"},
    "ALiBi": LAYER | {"position": "alibi", "n_kv_heads": 6},
    "parallel residual": LAYER | {"parallel_residual": True, "rotary_dim": 4},
}
LENGTHS = (5, 1, 7)
IDS = torch.arange(sum(LENGTHS)) * 37 % 96


def filled(layout: Layout, args: ModelArgs = ARGS, *, started: bool = False, **options) -> Decoder:
    """A decoder with prefixes, filled at random; started: what the method adds starts as it should."""
    quant, dtype = options.pop("quant", None), options.pop("dtype", torch.float32)
    method = Adapter(Adapter.Settings(**SETTINGS | options))
    decoder = method.decoder(args, dtype=dtype, storage=storage(quant) if quant else None)
    attachment = method.attach(decoder)
    fill(decoder, {}, drawn(decoder, attachment, started), layout, DataParallel(layout, "sdp", False))
    return decoder


def drawn(decoder: Decoder, attachment: Attachment, started: bool = False) -> Attachment:
    """The same with random starts: norms near one, so that they count."""

    def value(name: str, shape: tuple[int, ...]):
        return lambda generator: 0.3 * torch.randn(shape, generator=generator) + ("norm" in name or name == "prefix")

    initial = {target.name: value(target.name, target.whole_shape(1)) for target in targets(decoder)}
    return Attachment(attachment.trainable, initial | (attachment.initial if started else {}))


def product(x: Tensor, linear: Linear) -> Tensor:
    """x W^T with the linear's LoRA and bias, in float64."""
    y = x @ linear.weight.double().t() + x @ linear.lora_a.weight.double().t() @ linear.lora_b.weight.double().t()
    return y if linear.bias is None else y + linear.bias.double()


def by_formula(q: Tensor, decoder: Decoder, layer: int) -> Tensor:
    """What the heads of the block `layer` make of its prefix in float64, one head at a time."""
    attention, row = decoder.layers[layer].attention, layer - 1
    prefix = decoder.prefix[row, 0].double()
    keys, values = (product(prefix, linear).view(3, -1, 8) for linear in (attention.wk, attention.wv))
    if attention.k_norm is not None:
        scale = (keys.square().mean(-1, keepdim=True) + decoder.args.norm_eps).rsqrt()
        keys = keys * scale * attention.k_norm.weight.double()
    heads = []
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // keys.shape[1])
        weights = (q[:, head].double() @ keys[:, shared].t() / 8**0.5).softmax(-1)
        gate = decoder.prefix_gate[row, head].double().tanh() * decoder.prefix_new_gate[row].double()
        heads.append(gate * (weights @ values[:, shared]))
    return torch.stack(heads, 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_formula(layout: Layout, monkeypatch: pytest.MonkeyPatch, shape: dict) -> None:
    """In each block, and the gradients of prefix, gates, factors and queries; computed in parts of four tokens."""
    monkeypatch.setattr(linear_module, "_ROWS", 4)
    decoder = filled(layout, ARGS.model_copy(update=shape)).train()
    first, *others = decoder.layers
    assert first.attention.addition is None
    given, inputs = [], []
    for block in others:
        block.attention.addition.register_forward_hook(lambda _module, args, result: given.append((*args, result)))
        block.attention.register_forward_hook(lambda _module, args, result: inputs.append((*args, result)))
    decoder(IDS, decoder.sequences(LENGTHS))
    for layer, ((q, sequences, attention, _, found), (x, _, _, out)) in enumerate(
        [*zip(given, inputs, strict=True)], 1
    ):
        wanted = by_formula(q, decoder, layer)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
        asked = {"q": q, **{name: p for name, p in decoder.named_parameters() if name.startswith("prefix")}}
        asked |= {f"{name}.{factor}": getattr(getattr(attention, name), factor).weight
                  for name in ("wk", "wv") for factor in ("lora_a", "lora_b")}  # fmt: skip
        ours, theirs = (
            torch.autograd.grad(y.square().sum(), asked.values(), retain_graph=True) for y in (found, wanted)
        )
        for name, one, other in zip(asked, ours, theirs, strict=True):
            assert (one - other).norm() < 1e-4 * other.norm(), name
            assert other.norm() > 0, name
        own, attention.addition = attention.addition, None
        difference = out - attention(x, sequences)
        attention.addition = own
        through = wanted.flatten(1) @ attention.wo.weight.double().t()
        through += wanted.flatten(1) @ attention.wo.lora_a.weight.double().t() @ attention.wo.lora_b.weight.double().t()
        torch.testing.assert_close(difference.double(), through, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "quant"), [(torch.float32, None), (torch.bfloat16, "nf4"), (torch.bfloat16, "int3_g16")]
)
def test_a_new_adapter_changes_nothing(layout: Layout, dtype: torch.dtype, quant: str | None) -> None:
    """Logits are the base's bit for bit, in packed documents and while decoding; gates alone have a gradient."""
    decoder = filled(layout, dtype=dtype, quant=quant, started=True)
    base = Decoder(ARGS, dtype=dtype, storage=storage(quant) if quant else None)
    fill(base, {}, drawn(base, Attachment()), layout, DataParallel(layout, "sdp", False))
    for one in (decoder, base):
        for name, norm in one.named_modules():
            if "norm" in name:
                norm.float()
    hidden, wanted = (one.train()(IDS, one.sequences(LENGTHS)) for one in (decoder, base))
    assert torch.equal(hidden, wanted) and wanted.norm() > 1
    hidden.float().square().sum().backward()
    assert decoder.prefix_gate.grad.abs().min() > 0
    assert not decoder.prefix.grad.any() and not decoder.prefix_new_gate.grad.any()
    how = {"max_gen_len": 5, "max_seq_len": 32, "stop_ids": set()}
    one, other = (list(generate_tokens(its.eval(), [[1, 2, 3], [4]], **how)) for its in (decoder, base))
    assert one == other


def test_equals_pefts(tmp_path: Path, layout: Layout) -> None:
    """Logits and gradients beside ADAPTION_PROMPT: it has one gate a block, and no tanh."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    theirs = peft.get_peft_model(
        model, peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    )
    wrapped = [layer.self_attn for layer in model.model.layers[1:]]
    for attention, gate in zip(wrapped, (0.7, -0.4), strict=True):
        torch.nn.init.constant_(attention.adaption_gate, gate)
        torch.nn.init.normal_(attention.adaption_prompt)
    source = open_source(tmp_path)
    method = Adapter(Adapter.Settings(prefix_layers=2, prefix_len=3, norm_tuning=False, bias_tuning=False))
    decoder = method.decoder(model_args_of(source), dtype=torch.float32)
    attachment = method.attach(decoder)
    prompts = torch.stack([attention.adaption_prompt.detach() for attention in wrapped])
    attachment.initial["prefix"] = lambda _generator: prompts.clone()
    attachment.initial["prefix_gate"] = lambda _generator: torch.tensor([0.7, -0.4]).atanh()[:, None].repeat(1, 6)
    fill(
        decoder, resolve(decoder, [source], attachment, initialize=True), attachment, layout,
        DataParallel(layout, "sdp", False),
    )  # fmt: skip
    logits = decoder(IDS, decoder.sequences((13,))) @ decoder.head_weight.t()
    wanted = theirs(IDS[None]).logits[0]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), theirs.disable_adapter():
        assert (theirs(IDS[None]).logits[0] - wanted).abs().max() > 0.1  # prefixes do something
    logits.square().sum().backward()
    wanted.square().sum().backward()
    for i, attention in enumerate(wrapped):
        torch.testing.assert_close(decoder.prefix.grad[i], attention.adaption_prompt.grad, rtol=1e-3, atol=1e-2)
        slope = 1 - attention.adaption_gate.detach() ** 2  # of tanh
        torch.testing.assert_close(
            decoder.prefix_gate.grad[i].sum(), (attention.adaption_gate.grad * slope)[0], rtol=1e-3, atol=1e-2
        )


@torch.no_grad()
def test_keys_are_made_once_an_answer(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached answers are those of whole documents, also after weights have changed; training forgets the keys."""
    decoder, made, inner = filled(layout).eval(), [], prefix_attention.made_keys
    monkeypatch.setattr(prefix_attention, "made_keys", lambda *given: made.append(1) or inner(*given))
    prompt, found = [1, 2, 3], []
    for _ in range(2):
        how = {"max_gen_len": 6, "max_seq_len": 32, "stop_ids": set()}
        made.clear()
        answer = [token for (token,) in generate_tokens(decoder, [prompt], **how)]
        assert len(made) == 2
        likeliest = (
            decoder.train().eval()(torch.tensor(prompt + answer), decoder.sequences((9,))) @ decoder.head_weight.t()
        )
        assert likeliest.argmax(-1)[2:-1].tolist() == answer
        list(generate_tokens(decoder, [prompt], **how))
        places = [addition.place() for _, addition in decoder._prefixed()]
        decoder.prefix_new_gate.mul_(-20)
        found.append(answer)
        list(generate_tokens(decoder, [prompt], **how))
        assert all(addition.place() is place for (_, addition), place in zip(decoder._prefixed(), places, strict=True))
    assert found[0] != found[1]
    with torch.enable_grad():
        decoder(IDS, decoder.sequences(LENGTHS)).sum().backward()  # beside prepared keys, which have no gradient
    assert decoder.prefix.grad.any()
    assert all(addition.prepared is None for _, addition in decoder.train()._prefixed())
