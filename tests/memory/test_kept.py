"""What is measured of a forward on a stand-in, against what autograd saves of the true one, to the byte."""

from __future__ import annotations

import pytest
import torch

from accessory.data.batch import IGNORE
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.loss import cross_entropy_sum
from accessory.parallel.groups import Layout
from accessory.quant.groups import group_storage
from tests.memory.small_models import (
    LORA,
    NORM_BIAS,
    NORM_BIAS_LORA,
    SETTINGS,
    SHAPES,
    SMALL,
    TOKENS,
    Kept,
    built,
    filled,
    planned,
    step,
)


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_activations_are_what_is_saved(layout: Layout, settings: dict, quant: str | None) -> None:
    """To the byte, for one document: every tensor that autograd keeps is in the plan and nothing else is."""
    decoder, attachment = filled(layout, settings, quant=quant)
    kept, loss, _ = step(decoder)
    loss.backward()
    assert planned(decoder, attachment, layout).activations == kept.bytes


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_activations_on_the_meta_device(layout: Layout, settings: dict) -> None:
    """A decoder that is not filled has the same plan."""
    assert planned(*built(SMALL, settings), layout) == planned(*filled(layout, settings), layout)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_activations_of_full_training(layout: Layout, tied: bool) -> None:
    """Inputs of all linears, the embedding's rows and the head's gradient come on top."""
    args = SMALL.model_copy(update={"tie_word_embeddings": tied})
    decoder, attachment = filled(layout, {}, args=args, method="full", quant=None)
    kept, loss, _ = step(decoder)
    loss.backward()
    assert planned(decoder, attachment, layout).activations == kept.bytes


def test_what_lies_in_memory_is_no_index(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins hold whatever was there; a base whose channels lie in another order has indices among its parts."""
    decoder, attachment = built(SMALL, LORA, quant="int4_g32")
    for linear in (block.attention.wo for block in decoder.layers):
        linear.keep_packed(group_storage(4, 32, ("order",)))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **how: used(empty(*shape, **how)))
    assert planned(decoder, attachment, layout).activations > 0


def used(memory: torch.Tensor) -> torch.Tensor:
    """`memory`, in which something was before."""
    return memory.fill_(100) if memory.dtype == torch.int32 else memory


@pytest.mark.parametrize("settings", [NORM_BIAS, NORM_BIAS_LORA], ids=["NormBias", "NormBiasLoRA"])
def test_several_documents(layout: Layout, settings: dict) -> None:
    """However many there are: the same bytes a token."""
    decoder, attachment = filled(layout, settings)
    kept, _, _ = step(decoder, (10, 30, 8))
    assert kept.bytes == planned(decoder, attachment, layout).activations


@pytest.mark.parametrize("quant", [None, "nf4"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_activations_with_checkpointing(layout: Layout, settings: dict, quant: str | None) -> None:
    """The blocks' inputs and the head's part, as saved, and beside them what one block run again keeps."""
    decoder, attachment = filled(layout, settings, quant=quant)
    kept, again = kept_with_checkpointing(decoder)
    assert planned(decoder, attachment, layout, checkpointing=SMALL.n_layers).activations == kept + again
    assert kept < planned(decoder, attachment, layout).activations / 4


def kept_with_checkpointing(decoder: Decoder) -> tuple[int, int]:
    """Bytes that a step keeps whose blocks are all run again, and those that one of them keeps then."""
    for block in decoder.layers:
        block.recompute = True
    kept, loss, outputs = step(decoder)
    loss.backward()
    decoder.layers[1].recompute = False
    sequences, x = decoder.sequences((TOKENS,)), outputs[0].detach().requires_grad_()
    with Kept(decoder, x) as again:
        decoder.layers[1](x, sequences)
    return kept.bytes, again.bytes


@pytest.mark.parametrize("recomputed", [1, 2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_activations_with_some_layers_recomputed(layout: Layout, settings: dict, recomputed: int) -> None:
    """The first ones' inputs and what the others keep: nothing for running one again, as that room is free by then."""
    decoder, attachment = filled(layout, settings)
    for block in decoder.layers[:recomputed]:
        block.recompute = True
    kept, loss, _ = step(decoder)
    loss.backward()
    assert planned(decoder, attachment, layout, checkpointing=recomputed).activations == kept.bytes


@pytest.mark.parametrize("settings", [*SETTINGS.values(), "full"], ids=[*SETTINGS, "full"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_activations_of_other_blocks(layout: Layout, shape: dict, settings: dict | str) -> None:
    """To the byte again, with every kind of position, norm, activation and residual."""
    args = ModelArgs(**{**SMALL.model_dump(), "rotary_dim": None, "embedding_dim": None, **shape})
    full = {"method": "full", "quant": None, "settings": {}}
    decoder, attachment = filled(layout, args=args, **(full if settings == "full" else {"settings": settings}))
    kept, loss, _ = step(decoder)
    loss.backward()
    assert planned(decoder, attachment, layout).activations == kept.bytes


@pytest.mark.parametrize("settings", [NORM_BIAS, NORM_BIAS_LORA], ids=["NormBias", "NormBiasLoRA"])
@pytest.mark.parametrize("name", ["OPT-350m", "BLOOM", "GPT-NeoX", "GLM-4", "Qwen 3"])
def test_other_blocks_with_checkpointing(layout: Layout, name: str, settings: dict) -> None:
    """As `test_activations_with_checkpointing`."""
    args = ModelArgs(**{**SMALL.model_dump(), "rotary_dim": None, "embedding_dim": None, **SHAPES[name]})
    decoder, attachment = filled(layout, settings, args=args)
    found = planned(decoder, attachment, layout, checkpointing=SMALL.n_layers).activations
    assert found == sum(kept_with_checkpointing(decoder))


@pytest.mark.parametrize("name", ["LLaMA", "OPT", "BLOOM"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"state_bits": 8}, {"downsample": "avgpool"}, {"downsample": "linear", "side_layers": 2}, {"tail": 1},
     {"start": "released"}],
)  # fmt: skip
def test_activations_beside_a_base_without_backward(layout: Layout, settings: dict, name: str) -> None:
    """To the byte: a base block keeps nothing but what its reader wants, and a side block what its own width makes."""
    args = ModelArgs(**{**SMALL.model_dump(), **SHAPES.get(name, {})})
    decoder, attachment = filled(layout, {"r": 2, **settings}, args=args, method="qst")
    ids = torch.randint(0, 96, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with Kept(decoder) as kept:
        hidden = decoder(ids, decoder.sequences((TOKENS,)))
        loss = cross_entropy_sum(hidden, decoder.head_weight, ids, 96)
    loss.backward()
    assert planned(decoder, attachment, layout).activations == kept.bytes


def test_a_tail_keeps_nothing_of_norms_and_gates_where_no_gradient_goes(layout: Layout) -> None:
    """Of a quarter of the tokens alone, beside what attention keeps of all; of more than half, all is kept."""
    decoder, _ = filled(layout, {"tail": 2, "tail_rank": 3}, method="qst")
    ids = torch.randint(0, 96, (TOKENS,), generator=torch.Generator().manual_seed(0))

    def kept_for(labelled: int) -> int:
        labels = torch.full_like(ids, IGNORE)
        labels[:labelled] = 1
        with Kept(decoder) as kept:
            decoder(ids, decoder.sequences((TOKENS,)).with_labels(labels)).sum().backward()
        return kept.bytes

    few, more, size = TOKENS // 4, TOKENS // 2 + 1, torch.bfloat16.itemsize
    lows = 7 * 3 * size
    of_a_token = 2 * (SMALL.dim * size + 4) + 2 * SMALL.hidden_dim * size
    assert kept_for(TOKENS) - kept_for(more) == 2 * (TOKENS - more) * lows
    assert kept_for(TOKENS) - kept_for(few) == 2 * (TOKENS - few) * (lows + of_a_token)


def test_cuda_keeps_statistics() -> None:
    """A number a head and token; in fp32 k and v for every query head, and the numbers of whole blocks of 32 tokens."""
    for dtype, more in ((torch.bfloat16, 4 * 4 * TOKENS), (torch.float32, 2 * (64 - 32) * 4 * TOKENS + 4 * 4 * 64)):
        decoder, attachment = built(SMALL, {"lora_rank": 8, "lora_dropout": 0.1}, dtype=dtype)
        on_cpu, on_cuda = (planned(decoder, attachment, Layout(device=torch.device(d))) for d in ("cpu", "cuda"))
        assert on_cuda.activations - on_cpu.activations == SMALL.n_layers * more
