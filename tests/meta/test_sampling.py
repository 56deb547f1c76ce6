"""How an answer is chosen: values that cannot be, and those of upstream's callers."""

from __future__ import annotations

import pytest
import torch

from accessory.errors import ConfigError
from accessory.meta import MetaModel


@pytest.mark.parametrize(("wrong", "said"), [
    ({"temperature": -1.0, "top_p": 2}, r"(?s)'temperature' is -1.0: .*'top_p' is 2: "),
    ({"top_p": 0}, "'top_p' is 0: "),
    ({"temperature": float("nan")}, "'temperature' is nan: "), ({"seed": None}, "'seed' is None: "),
    ({"max_gen_len": None}, "'max_gen_len' is None: Input should be a valid integer"),
    ({"max_new_tokens": 5}, "unknown key 'max_new_tokens': max_gen_len is the longest answer"),
    ({"num_gpus": 2}, "unknown key 'num_gpus': torchrun starts the processes: torchrun --nproc-per-node=N"),
    ({"return_logits": True}, r"unknown key 'return_logits': compute_logits\(prompt\)"),
    ({"stop_strings": "a", "sed": 1}, r"(?s)'stop_strings': stop are .*unknown key 'sed'. Did you mean 'seed'"),
])  # fmt: skip
def test_wrong_ways_to_answer(model: MetaModel, wrong: dict, said: str) -> None:
    """A negative temperature was no sampling, a top_p beyond 1 all tokens, without a word."""
    with pytest.raises(ConfigError, match=said):
        model.generate(["q"], **wrong)
    with pytest.raises(ConfigError, match=said):
        list(model.stream_generate("q", **wrong))


def test_upstreams_arguments_of_generate_unset(model: MetaModel) -> None:
    """As its users' scripts give them, for a model without vision."""
    unset = {"images": None, "return_logits": False, "max_gen_len": 4}
    assert model.generate(["q"], None, max_gen_len=4) == model.generate(["q"], max_gen_len=4)
    assert torch.equal(model.compute_logits("q", None), model.compute_logits("q", images=None))
    assert model.evaluate_examples("qq", "q", images=None)["ppl"] == model.evaluate_examples("qq", "q", None)["ppl"]
    for ask in (model.compute_logits, model.evaluate_examples, model.generate):
        with pytest.raises(ConfigError, match=r"images is 'a.png', and this model has no image encoder. Load one"):
            ask(["q"], images="a.png")
    assert model.generate(["q"], **unset) == model.generate(["q"], max_gen_len=4)
    assert list(model.stream_generate("q", image=None, max_gen_len=4))[-1] == model.generate("q", max_gen_len=4)
