"""Run alone or under torchrun with a file's name: rank 0 writes there what every kind of decoder computes.

Loss, gradients (put together from the ranks), logits and greedy answers, in fp32, with a vocabulary of 97 rows.
"""

import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

from accessory.checkpoint.lazy import HeldTensor
from accessory.checkpoint.load import fill, named_generator, targets
from accessory.checkpoint.training_state import _place
from accessory.generate import KeptCache, generate_tokens, next_token_logits
from accessory.method import METHODS, Attachment
from accessory.model.args import ModelArgs
from accessory.model.choice import Choice
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum
from accessory.model.scores import token_scores
from accessory.model.teaching import Teaching
from accessory.parallel import groups
from accessory.parallel.data import DataParallel
from accessory.parallel.parameters import NamedParameters
from accessory.parallel.tensor import Slicing, gather_slices, own_slice

SMALL = {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "hidden_dim": 80, "vocab_size": 97, "max_seq_len": 32}
LAYER = {"norm": "layer", "qkv_bias": True, "out_bias": True, "mlp_bias": True}
SHAPES = {
    "llama": {},
    "mistral": {"sliding_window": 3, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "rotary_layout": "halves"},
    "opt": LAYER | {"position": "learned", "gated": False, "activation": "relu", "embedding_dim": 24,
                    "norm_placement": "after", "final_norm": False, "tie_word_embeddings": True},
    "bloom": LAYER | {"position": "alibi", "gated": False, "activation": "gelu_tanh", "embedding_norm": True},
    "neox": LAYER | {"parallel_residual": True, "gated": False, "activation": "gelu", "rotary_dim": 4},
    "glm4": {"norm_placement": "both", "rotary_dim": 4},
}  # fmt: skip
LENGTHS = (9, 1, 6)
SETTINGS = {
    "peft": {"lora_rank": 4},
    "qst": {"r": 2, "side_heads": 6},
    "adapter": {"lora_rank": 4, "prefix_layers": 1, "prefix_len": 3, "use_prefix_new_gate": True, "scale_tuning": True},
}


def initial(name: str, shape: tuple[int, ...]):
    """A maker of values: norms near one, so that they count."""
    return lambda generator: 0.2 * torch.randn(shape, generator=generator) + ("norm" in name)


def results(shape: dict, method: str, layout: groups.Layout) -> dict[str, torch.Tensor]:
    """One decoder, one micro-batch, one batch of answers."""
    trainer = METHODS[method](METHODS[method].Settings(**SETTINGS.get(method, {})))
    how = {"dtype": torch.float32, "rank": layout.mp_rank, "ranks": layout.mp_size}
    decoder = trainer.decoder(ModelArgs(**SMALL | shape), **how)
    attachment = trainer.attach(decoder)
    makers = {t.name: initial(t.name, t.whole_shape(layout.mp_size)) for t in targets(decoder)}
    slicings = {target.name: target.slicing for target in targets(decoder)}
    held = {name: HeldTensor(make(named_generator(0, name))) for name, make in makers.items()}
    tensors = held if method == "full" else {}  # as from a checkpoint, or as a method starts them
    fill(decoder, tensors, Attachment(attachment.trainable, makers), layout, DataParallel(layout, "sdp", False))
    generator = torch.Generator().manual_seed(0)
    ids, labels = (torch.randint(0, 97, (sum(LENGTHS),), generator=generator) for _ in range(2))
    ids[0] = labels[3] = 96  # the last row is somebody's
    hidden = decoder.train()(ids, decoder.sequences(LENGTHS))
    loss = cross_entropy_sum(hidden, decoder.head_weight, labels, 97)
    loss.backward()
    weights = NamedParameters(dict(decoder.named_parameters()), slicings)
    parameters = weights.only({name for name, p in weights.items() if p.requires_grad})
    parameters.sum_partial_gradients()
    found = {"loss": loss.detach(), "norm": parameters.gradient_norm()}
    gradients = dict(parameters.gathered({name: p.grad for name, p in parameters.items()}))
    for name, whole in gradients.items():  # what a resumed run does with whole moments gives every rank its part again
        assert torch.equal(_place(whole, parameters[name], slicings[name], layout), parameters[name].grad), name
    found |= {f"gradient {name}": value.clone() for name, value in gradients.items()}
    found |= {name: value.clone() for name, value in weights.gathered()}
    with torch.no_grad():
        found["logits"] = next_token_logits(decoder, hidden)
    prompts = [[5, 96, 33, 2, 60], [9], [77, 3, 50]]
    steps = generate_tokens(decoder.eval(), prompts, max_gen_len=8, max_seq_len=32, stop_ids=set())
    found["answers"] = torch.tensor(list(steps))
    choice = Choice(1.2, top_k=30, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    draws = [torch.Generator().manual_seed(seed + 10 * layout.mp_rank) for seed in range(3)]  # the first rank's count
    how = {"max_gen_len": 8, "max_seq_len": 32, "stop_ids": set(), "choice": choice, "generators": draws}
    found["drawn"] = torch.tensor(list(generate_tokens(decoder, prompts, **how)))
    check_kept(decoder)
    return {name: value.detach() for name, value in found.items()}


def check_kept(decoder: Decoder) -> None:
    """A prompt that goes on from an earlier one and its answer is answered as from scratch."""

    def answer(prompt: list[int], kept: KeptCache | None) -> list[int]:
        how = {"max_gen_len": 8, "max_seq_len": 32, "stop_ids": set(), "kept": kept}
        return [token for (token,) in generate_tokens(decoder, [prompt], **how)]

    kept, prompt = KeptCache(), [5, 96, 33, 2, 60]
    longer = prompt + answer(prompt, kept)[:4] + [7, 8, 9]
    assert answer(longer, kept) == answer(longer, None)


def of_the_loss(dtype: torch.dtype, layout: groups.Layout) -> dict[str, torch.Tensor]:
    """Cross-entropy alone, behind a head with a row of padding; bf16 is what a CPU may have a kernel for."""
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(rows, 48, generator=generator).to(dtype) for rows in (300, 98))
    labels = torch.randint(0, 97, (300,), generator=generator)
    labels[::3], head[97] = -100, 9
    mine = own_slice(head, Slicing(dim=0), layout.mp_rank, layout.mp_size).clone().requires_grad_()
    hits = torch.zeros((), dtype=torch.float64)
    loss = cross_entropy_sum(hidden.requires_grad_(), mine, labels, 97, hits=hits)
    loss.backward()
    found = {"loss": loss.detach(), "hits": hits, "hidden": hidden.grad, "head": gather_slices(mine.grad, 0)}
    theirs, rows = hidden.detach().flip(1), own_slice(head.flip(0), Slicing(dim=0), layout.mp_rank, layout.mp_size)
    teaching = Teaching(theirs, rows.clone(), 95, 0.4, 2.0, torch.zeros((), dtype=torch.float64))
    hidden.grad = mine.grad = None
    taught = cross_entropy_sum(hidden, mine, labels, 97, teaching=teaching)
    taught.backward()
    found |= {"taught": taught.detach(), "entropy": teaching.entropy}
    found |= {"hidden, taught": hidden.grad, "head, taught": gather_slices(mine.grad, 0)}
    head[[0, 60]], head[70] = 5, -5  # of equal scores on two ranks, the first is the likeliest
    labels[1::3] = torch.tensor([0, 60, 70])[labels[1::3] % 3]
    above = hidden.detach().abs() * torch.tensor([1, 1, -1]).repeat(100)[:, None]  # of 0 and 60, or of 70
    mine = own_slice(head, Slicing(dim=0), layout.mp_rank, layout.mp_size)
    log_p, likeliest, divergences = token_scores(above, mine, labels, 97, teaching)
    found |= {"log p": log_p, "likeliest": likeliest, "divergences": divergences}
    wanted = torch.tensor([0, 0, 70]).repeat(100) == labels
    assert torch.equal(likeliest, wanted[labels >= 0])
    return found


CASES = [(name, method) for name in SHAPES for method in ("full", "peft", "qst")]
CASES += [("qwen3", "adapter"), ("bloom", "adapter")]
layout = groups.start("cpu", model_parallel_size=int(sys.argv[2]))
everything = {f"{name} {method}": results(SHAPES[name], method, layout) for name, method in CASES}
everything |= {f"loss in {dtype}": of_the_loss(dtype, layout) for dtype in (torch.float32, torch.bfloat16)}
if layout.is_main:
    torch.save(everything, sys.argv[1])
groups.end_process()
