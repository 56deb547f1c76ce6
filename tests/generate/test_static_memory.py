"""Decoding in fixed places, as a GPU does it, on the CPU: the same answers as in the documents' own shapes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from accessory.checkpoint.load import fill, targets
from accessory.generate import KeptCache, generate_tokens, replays, static_memory
from accessory.generate.replays import CudaGraphs, Recorded, recorder_for
from accessory.generate.static_memory import documents_together, span_of
from accessory.kernels.few_rows import JoinedMatrices
from accessory.kernels.plain import decoding_attention, decoding_products
from accessory.method import METHODS, Attachment
from accessory.model.args import ModelArgs
from accessory.model.choice import Choice
from accessory.model.decoder import Decoder
from accessory.parallel import groups
from accessory.parallel.data import DataParallel
from accessory.quant import storage

LLAMA = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "hidden_dim": 128, "vocab_size": 96}
MODELS = {
    "llama": {},
    "windows": {"sliding_window": 5},
    "qk_norm": {"qk_norm": True, "rotary_layout": "halves"},
    "alibi": {"position": "alibi", "norm": "layer", "gated": False, "activation": "gelu_tanh", "embedding_norm": True,
              "n_kv_heads": 4},
    "learned": {"position": "learned", "position_offset": 2, "norm": "layer", "gated": False, "activation": "relu",
                "qkv_bias": True, "out_bias": True, "mlp_bias": True, "embedding_dim": 32},
    "neox": {"rotary_dim": 8, "parallel_residual": True, "norm": "layer", "gated": False, "activation": "gelu"},
    "glm": {"norm_placement": "after"},
}  # fmt: skip
METHODS_BESIDE = {
    "peft": {"lora_rank": 4, "bias_tuning": True},
    "adapter": {"prefix_layers": 1, "prefix_len": 3, "use_prefix_new_gate": True, "scale_tuning": True},
    "qst": {"side_layers": 1, "tail": 1, "r": 2, "side_heads": 2},
}
STORAGES = ("nf4", "int3_g32", "int8")
PROMPTS = [[5, 17, 33, 2, 60, 41, 8], [9], [77, 3, 50]]
LENGTH = 15


class Recording:
    """Stands in for CUDA graphs: what is recorded is done again at each replay, its result in the same place."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> Recorded:
        """See `Recorder`."""
        self.recorded += 1
        result = torch.empty(0)

        def replay() -> None:
            """Do the work."""
            self.replayed += 1
            result.set_(work())

        return Recorded(replay, result)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    """From here on answers are given in fixed places, and attention looks at 8, 16, ... tokens."""
    made = Recording()
    monkeypatch.setattr(static_memory, "launches_count", lambda device: True)
    monkeypatch.setattr(static_memory, "recorder_for", lambda device, ranks: made)
    monkeypatch.setattr(static_memory, "SHORTEST", 8)
    return made


def decoder_of(layout: groups.Layout, settings: dict, method: str = "", quant: str = "") -> Decoder:
    """Filled at random in fp32, its biases and factors too."""
    args, how = ModelArgs(**LLAMA | settings), {"dtype": torch.float32, "storage": storage(quant) if quant else None}
    made = METHODS[method or "peft"](METHODS[method or "peft"].Settings(**METHODS_BESIDE.get(method, {})))
    decoder = made.decoder(args, **how) if method else Decoder(args, **how)
    attachment = made.attach(decoder) if method else Attachment()

    def value(name: str, shape: tuple[int, ...]) -> Callable[[torch.Generator], Tensor]:
        """Norms near one."""
        return lambda generator: 0.2 * torch.randn(shape, generator=generator) + ("norm" in name and "bias" not in name)

    initial = {t.name: value(t.name, t.whole_shape(1)) for t in targets(decoder)}
    fill(decoder, {}, Attachment(attachment.trainable, initial), layout, DataParallel(layout, "sdp", False))
    return decoder.requires_grad_(False).eval()


def answers(decoder: Decoder, prompts: list[list[int]], **options) -> list[list[int]]:
    """Of a batch."""
    options = {"max_gen_len": LENGTH, "max_seq_len": 64, "stop_ids": set(), **options}
    steps = list(generate_tokens(decoder, prompts, **options))
    return [[step[i] for step in steps if step[i] is not None] for i in range(len(prompts))]


def growing(decoder: Decoder, prompts: list[list[int]], **options) -> list[list[int]]:
    """The same in the documents' own shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_memory, "launches_count", lambda device: False)
        return answers(decoder, prompts, **options)


CASES = [
    *((model, "", "") for model in MODELS),
    *(("llama", method, "nf4") for method in METHODS_BESIDE),
    *(("llama", "peft", quant) for quant in STORAGES[1:]),
]


@pytest.mark.parametrize(("model", "method", "quant"), CASES)
def test_every_model_answers_the_same(
    layout: groups.Layout, recording: Recording, model: str, method: str, quant: str
) -> None:
    """Token for token, in fp32, and nearly equal logits; several documents, over several spans of the cache."""
    decoder, outputs = decoder_of(layout, MODELS[model], method, quant), []
    decoder.register_forward_hook(lambda module, given, result: outputs.append(result.clone()))
    wanted = growing(decoder, PROMPTS)
    theirs, outputs[:] = outputs[1:], []  # the first is the prompts'
    found = answers(decoder, PROMPTS)
    assert found == wanted and len({token for answer in found for token in answer}) > 5
    assert recording.recorded == 2 and recording.replayed == 11  # 16 and 32 tokens are looked at; the 8 once only
    for one, other in zip(outputs[1:], theirs, strict=True):
        torch.testing.assert_close(one[:3], other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_the_chain_answers_the_same(
    layout: groups.Layout, recording: Recording, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Where its kernels can be used; here they are written out."""
    monkeypatch.setattr(
        static_memory, "decoding_kernels", lambda device, dtype: (decoding_products, decoding_attention)
    )
    decoder, before = decoder_of(layout, {}, "peft", "nf4"), []
    decoder.register_forward_hook(lambda module, given, result: before.append(len(result)))
    wanted = growing(decoder, PROMPTS[:count])
    before.clear()
    assert answers(decoder, PROMPTS[:count]) == wanted
    assert before == [sum(map(len, PROMPTS[:count]))]  # the prompts alone
    chain = decoder.answering.chain
    factor = decoder.layers[0].attention.wq.lora_a.weight
    with torch.no_grad():
        factor.neg_()
    assert answers(decoder, PROMPTS[:count]) == growing(decoder, PROMPTS[:count]) != wanted
    assert decoder.answering.chain is not chain


def test_documents_end_one_by_one(layout: groups.Layout, recording: Recording) -> None:
    """At stop tokens and for want of room; the others go on, also after they have moved together."""
    decoder = decoder_of(layout, {})
    prompts = [[n * 7 % 96, n + 3] + [n] * (n % 4) for n in range(9)]
    plain = growing(decoder, prompts)
    stops = {answer[n % 5 + 2] for n, answer in enumerate(plain)}
    for how in ({"stop_ids": stops}, {"max_seq_len": 9}, {"stop_ids": stops, "choice": Choice(repetition_penalty=1.7)}):
        wanted = growing(decoder, prompts, **how)
        assert len({len(answer) for answer in wanted}) > 2
        assert answers(decoder, prompts, **how) == wanted, how


@pytest.mark.parametrize("chained", [False, True])
def test_the_cache_has_room_for_documents_that_have_ended(
    layout: groups.Layout, recording: Recording, monkeypatch: pytest.MonkeyPatch, chained: bool
) -> None:
    """They are computed on beside those that go on, which have more room."""
    if chained:
        monkeypatch.setattr(static_memory, "decoding_kernels", lambda *_: (decoding_products, decoding_attention))
    decoder, prompts = decoder_of(layout, {}, "", "nf4"), [[7] * 12, [9], [4, 3], [5]]
    wanted = growing(decoder, prompts, max_seq_len=16)
    assert [len(answer) for answer in wanted] == [4, 15, 14, 15]
    assert answers(decoder, prompts, max_seq_len=16) == wanted
    assert decoder.answering.longest == 16 and (decoder.answering.chain is not None) == chained


def test_answers_beside_one_another(layout: groups.Layout, recording: Recording) -> None:
    """Two that are asked for in turn do not share their places; the next one uses the last one's again."""
    decoder = decoder_of(layout, {})
    how = {"max_gen_len": LENGTH, "max_seq_len": 64, "stop_ids": set()}
    both = zip(*(generate_tokens(decoder, [prompt], **how) for prompt in PROMPTS[:2]), strict=True)
    found = [[token for (token,) in steps] for steps in zip(*both, strict=True)]
    assert found == [growing(decoder, [prompt])[0] for prompt in PROMPTS[:2]]
    del both
    memory = decoder.answering
    answers(decoder, PROMPTS[1:2])
    assert decoder.answering is memory


def test_products_that_wait_are_not_recorded(layout: groups.Layout, recording: Recording) -> None:
    """A GPU cannot record what the host decides."""
    decoder = decoder_of(layout, {}, "", "llm_int8")
    assert answers(decoder, PROMPTS) == growing(decoder, PROMPTS)
    assert decoder.answering is None and not recording.recorded


def test_drawn_tokens(layout: groups.Layout, recording: Recording) -> None:
    """With a seed for each document, some of which are stopped from outside."""
    decoder, said = decoder_of(layout, {}), []

    def how(answer: list) -> dict:
        """A choice, and who is over: document 1 after four tokens of everybody's."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        answer.clear()
        return {"choice": Choice(1.0, top_k=20), "generators": generators, "stopped": lambda: stopped(answer)}

    def stopped(answer: list) -> set[int]:
        answer.append(None)
        return {1} if len(answer) == 4 else set()

    wanted = growing(decoder, PROMPTS, **how(said))
    assert len(wanted[1]) == 3
    assert answers(decoder, PROMPTS, **how(said)) == wanted


def test_memory_is_used_again(layout: groups.Layout, recording: Recording) -> None:
    """By answers that fit, with what was recorded; not by others, nor beside other weights, nor after training."""
    decoder = decoder_of(layout, {}, "peft", "nf4")
    wanted = growing(decoder, PROMPTS)
    answers(decoder, PROMPTS)
    memory, count = decoder.answering, recording.recorded
    with torch.inference_mode():
        for layer in memory.layers:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
    assert answers(decoder, PROMPTS) == wanted
    assert decoder.answering is memory and recording.recorded == count + 1  # the second use of 8 tokens
    factor = decoder.layers[0].attention.wq.lora_a
    factor.weight = torch.nn.Parameter(-factor.weight, requires_grad=False)
    changed = answers(decoder, PROMPTS)
    assert decoder.answering is memory and recording.recorded == count + 3
    assert changed == growing(decoder, PROMPTS) != wanted
    assert copy.deepcopy(decoder).answering is None
    answers(decoder, [[1] * 40], max_gen_len=20)
    assert decoder.answering is not memory
    decoder.train()
    assert decoder.answering is None


def test_a_document_does_not_spoil_those_that_take_its_place(layout: groups.Layout, recording: Recording) -> None:
    """Its keys may be no numbers; here those of the first one, which ends first and is the longest."""
    decoder, prompts = decoder_of(layout, {}), [[7] * 12, [9], [4, 3]]
    wanted, found = growing(decoder, prompts), [[], [], []]
    how = {"max_gen_len": LENGTH, "max_seq_len": 64, "stop_ids": set(), "stopped": lambda: {0} if found[0] else ()}
    for step in generate_tokens(decoder, prompts, **how):
        for answer, token in zip(found, step, strict=True):
            answer += [] if token is None else [token]
        if len(found[1]) == 1:
            with torch.inference_mode():
                for layer in decoder.answering.layers:
                    layer.keys[0], layer.values[0] = torch.nan, torch.nan
    assert found == [wanted[0][:1], *wanted[1:]]


def test_what_products_lay_out_outlives_its_recording(layout: groups.Layout, recording: Recording) -> None:
    """`train` lets go of it, though no weight has changed; a kept document's memory is still there."""
    decoder, kept = decoder_of(layout, {}, "peft", "nf4"), KeptCache()
    answers(decoder, PROMPTS[:1], kept=kept)
    weight, memory = decoder.layers[0].attention.wq.weight, kept.static()
    weight.prepared = laid_out = JoinedMatrices([weight.as_codes()], lambda *_: None)
    with torch.inference_mode():
        memory.begin([1])
    memory.replays.run("key", lambda: torch.zeros(1))
    laid_out, places = weakref.ref(laid_out), memory._weights
    decoder.train().eval()
    assert laid_out() is not None
    del places
    with torch.inference_mode():
        memory.begin([1])
    assert laid_out() is None and not memory.replays._done


def test_a_kept_document(layout: groups.Layout, recording: Recording) -> None:
    """It goes on in its own cache, which grows."""
    decoder, kept = decoder_of(layout, {}), KeptCache()
    first = answers(decoder, PROMPTS[:1], kept=kept)
    assert first == growing(decoder, PROMPTS[:1])
    assert kept.tokens == PROMPTS[0] + first[0][:-1]
    longer, memory = PROMPTS[0] + first[0][:9] + [4, 70, 2], kept.static()
    for length in (3, 30):
        wanted = growing(decoder, [longer], max_gen_len=length)
        assert answers(decoder, [longer], max_gen_len=length, kept=kept) == wanted
        assert (kept.static() is memory) == (length == 3)
    assert decoder.answering is None


def test_trained_decoders_answer_in_their_own_shapes(layout: groups.Layout, recording: Recording) -> None:
    """Their memory is spoken for."""
    decoder = decoder_of(layout, {})
    decoder.norm.weight.requires_grad_()
    answers(decoder, PROMPTS)
    assert decoder.answering is None


def test_what_cannot_be_recorded_is_done(
    layout: groups.Layout, recording: Recording, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And said once."""

    def refuse(work: Callable[[], Tensor]) -> Recorded:
        """As a driver may."""
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(static_memory, "recorder_for", lambda device, ranks: refuse)
    decoder = decoder_of(layout, {})
    assert answers(decoder, PROMPTS) == growing(decoder, PROMPTS)
    (record,) = caplog.records
    assert "RuntimeError: operation not permitted when stream is capturing" in record.getMessage()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Stands in for torch.cuda; each graph has a pool of its own name."""
    made = MagicMock()

    class Graph:
        """Replays nothing."""

        def __init__(self) -> None:
            self.number = len(made.pools)

        def pool(self) -> int:
            """Its name."""
            return self.number

        def replay(self) -> None:
            """Nothing."""

    def graph(_graph: Graph, *, pool: int | None, capture_error_mode: str) -> MagicMock:
        """Notes the pool; the graph is not kept."""
        made.pools.append(pool)
        return made.recording

    made.CUDAGraph, made.graph, made.pools, made.memory_reserved.return_value = Graph, graph, [], 0
    made.recording.__exit__.return_value = False
    monkeypatch.setattr(replays.torch, "cuda", made)
    return made


def test_graphs_share_a_pool_while_one_is_left(cuda: MagicMock) -> None:
    """PyTorch refuses to record into a pool that no graph uses any more, if anything of it is still alive."""
    record, kept = CudaGraphs(torch.device("cuda")), []
    for _ in range(2):
        kept.append(record(lambda: torch.zeros(1)))
    kept.clear()
    record(lambda: torch.zeros(1))
    assert cuda.pools == [None, 0, None]


def test_a_failed_recording_is_left(cuda: MagicMock) -> None:
    """PyTorch's current stream and its random numbers are afterwards what they were."""
    cuda.default_generators = MagicMock()
    cuda.recording.__exit__.side_effect = RuntimeError("invalidated")
    with pytest.raises(RuntimeError, match="invalidated"):
        CudaGraphs(torch.device("cuda"))(lambda: torch.zeros(1))
    stream = cuda.current_stream.return_value
    cuda.set_stream.assert_called_once_with(stream)
    generator = cuda.default_generators[stream.device_index]
    generator.graphsafe_set_state.assert_called_once_with(generator.clone_state.return_value)


def test_ranks_are_not_recorded() -> None:
    """One of them could fail alone; and a CPU has nothing to record with."""
    assert recorder_for(torch.device("cpu"), 1) is None and recorder_for(torch.device("cuda"), 2) is None
    assert isinstance(recorder_for(torch.device("cuda"), 1), CudaGraphs)


def test_sizes() -> None:
    """Few different ones."""
    assert [documents_together(n) for n in (1, 2, 3, 5, 8, 9, 16, 17)] == [1, 2, 4, 8, 8, 16, 16, 24]
    assert [span_of(n, 1536) for n in (1, 256, 257, 1024, 1025)] == [256, 256, 512, 1024, 1536]
