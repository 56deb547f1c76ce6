"""Decoding, token for token, against transformers on a tiny random model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from accessory.checkpoint.load import fill, resolve, targets
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import model_args_of
from accessory.errors import ConfigError, NotFiniteError
from accessory.generate import KeptCache, generate_tokens, next_token_logits
from accessory.kernels.avx512.packed_gemv import MOST_ROWS
from accessory.method import Attachment
from accessory.model.args import ModelArgs, RopeScaling
from accessory.model.choice import Choice
from accessory.model.decoder import Decoder
from accessory.model.sequences import Sequences
from accessory.parallel import groups
from accessory.parallel.data import DataParallel
from accessory.quant import storage
from accessory.quant.four_bit import FourBitWeight
from tests.model.families.subject import read_decoder

needs_kernel = pytest.mark.usefixtures("needs_cpu_kernels")
PROMPTS = [[5, 17, 33, 2, 60, 41, 8], [9], [77, 3, 50]]
LENGTH = 15


@pytest.fixture(scope="module")
def pair(layout: groups.Layout, tmp_path_factory) -> tuple[transformers.LlamaForCausalLM, Decoder]:
    """A random transformers model and our decoder filled from its checkpoint, both fp32."""
    path: Path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(path)
    return model, read_decoder(path, layout)[0]


@pytest.fixture
def decoder(pair) -> Decoder:
    """Ours alone."""
    return pair[1]


@pytest.fixture
def greedy(pair) -> list[list[int]]:
    """What transformers answers to each prompt, 15 tokens each."""
    return [
        pair[0].generate(
            torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()
        for prompt in PROMPTS
    ]  # fmt: skip


def collect(decoder: Decoder, prompts: list[list[int]], **options) -> list[list[int]]:
    """The answers of a batch; checks that an ended prompt stays ended."""
    options = {"max_gen_len": LENGTH, "max_seq_len": 64, "stop_ids": set(), **options}
    answers: list[list[int | None]] = [[] for _ in prompts]
    for step in generate_tokens(decoder, prompts, **options):
        for answer, token in zip(answers, step, strict=True):
            answer.append(token)
    ended = [[token for token in answer if token is not None] for answer in answers]
    for answer, kept in zip(answers, ended, strict=True):
        assert answer[: len(kept)] == kept
    return ended


def test_greedy_equals_transformers(decoder: Decoder, greedy: list[list[int]]) -> None:
    """A batch of unequal prompts over one cache, and each alone."""
    assert collect(decoder, PROMPTS) == greedy
    assert [collect(decoder, [prompt])[0] for prompt in PROMPTS] == greedy
    assert len({token for answer in greedy for token in answer}) > 10  # not one token over and over


def test_stop_token_ends_one_and_not_the_others(decoder: Decoder, greedy: list[list[int]]) -> None:
    """It is not yielded itself; the rest of the batch goes on as before."""
    stop = greedy[0][3]
    wanted = [answer[: answer.index(stop)] if stop in answer else answer for answer in greedy]
    assert len(wanted[0]) <= 3
    assert any(len(answer) == LENGTH for answer in wanted)
    assert collect(decoder, PROMPTS, stop_ids={stop}) == wanted


def test_stopping_at_once_yields_nothing(decoder: Decoder, greedy: list[list[int]]) -> None:
    """Where every first token is a stop token."""
    assert collect(decoder, PROMPTS, stop_ids={answer[0] for answer in greedy}) == [[], [], []]


@pytest.mark.parametrize("length", [0, 1, 4])
def test_max_gen_len(decoder: Decoder, greedy: list[list[int]], length: int) -> None:
    """No more new tokens than asked for."""
    assert collect(decoder, PROMPTS, max_gen_len=length) == [answer[:length] for answer in greedy]


def test_what_ended_is_computed_no_further(decoder: Decoder, greedy: list[list[int]]) -> None:
    """Each step looks up the tokens of the prompts that go on, and no others; the last step's are never looked up."""
    stop = greedy[0][3]
    lengths = [answer.index(stop) if stop in answer else LENGTH for answer in greedy]
    seen: list[int] = []
    handle = decoder.tok_embeddings.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        collect(decoder, PROMPTS, stop_ids={stop})
    finally:
        handle.remove()
    assert seen == [11, *(sum(step <= length for length in lengths) for step in range(1, LENGTH))]


def test_prompts_read_in_groups(pair) -> None:
    """More tokens than the kernel of few rows takes, whole prompts at a time; one that is longer alone."""
    model, decoder = pair
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1, 96, (n,), generator=generator).tolist() for n in (30, 18, 1, 60, 20, 29)]
    seen: list[int] = []
    handle = decoder.tok_embeddings.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        answers = collect(decoder, prompts, max_gen_len=4, max_seq_len=100)
    finally:
        handle.remove()
    assert MOST_ROWS == 48 and seen == [48, 1, 60, 20, 29, 6, 6, 6]
    for prompt, answer in zip(prompts, answers, strict=True):
        full = model.generate(
            torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert answer == full[0, len(prompt) :].tolist()


def test_max_seq_len(decoder: Decoder, greedy: list[list[int]]) -> None:
    """Prompt and answer together; the longest prompt ends first and the others go on undisturbed."""
    assert collect(decoder, PROMPTS, max_seq_len=9) == [greedy[0][:2], greedy[1][:8], greedy[2][:6]]


@pytest.mark.parametrize(("prompt", "count"), [([], 0), ([1] * 9, 9)])
def test_prompts_without_room_are_refused(decoder: Decoder, prompt: list[int], count: int) -> None:
    """Before anything is computed."""
    with pytest.raises(ConfigError, match=f"A prompt has {count} tokens; expected 1 to 8"):
        collect(decoder, [[1], prompt], max_seq_len=9)


def test_sampling_follows_its_generator(decoder: Decoder) -> None:
    """The same seed gives the same answers, another one others."""
    one, two, three = (
        collect(decoder, PROMPTS, generators=seeded(seed), choice=Choice(1.0, top_p=0.95)) for seed in (1, 1, 2)
    )
    assert one == two
    assert one != three


def test_nothing_to_draw_from_is_said(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that overflows."""
    monkeypatch.setattr(decoder.norm.weight, "data", torch.full_like(decoder.norm.weight, torch.nan))
    with pytest.raises(NotFiniteError, match=r"are no finite numbers.*--dtype"):
        collect(decoder, PROMPTS, choice=Choice(1.0))


def seeded(*seeds: int) -> list[torch.Generator]:
    """A generator for each."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_seeds_of_their_own_make_answers_independent(decoder: Decoder) -> None:
    """Each as alone, whoever ends before it; and of one prompt several, which is read once."""
    how = {"choice": Choice(1.0, top_k=20, repetition_penalty=1.3), "stop_ids": {3, 5, 8, 13, 21}}
    alone = [collect(decoder, [prompt], generators=seeded(n), **how)[0] for n, prompt in enumerate(PROMPTS)]
    assert collect(decoder, PROMPTS, generators=seeded(0, 1, 2), **how) == alone
    assert len({len(answer) for answer in alone}) > 1
    seen: list[int] = []
    handle = decoder.tok_embeddings.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        several = collect(decoder, PROMPTS[:1] * 4, generators=seeded(0, 1, 2, 3), **how)
    finally:
        handle.remove()
    assert several == [collect(decoder, PROMPTS[:1], generators=seeded(n), **how)[0] for n in range(4)]
    assert seen[:2] == [7, 4] and len(set(map(tuple, several))) == 4


def test_repetition_penalty_equals_transformers(pair, decoder: Decoder, greedy: list[list[int]]) -> None:
    """Greedy, over prompt and answer, while others of the batch end."""
    penalized = collect(decoder, PROMPTS, choice=Choice(repetition_penalty=1.7))
    for prompt, answer in zip(PROMPTS, penalized, strict=True):
        wanted = pair[0].generate(
            torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=None, pad_token_id=0,
            repetition_penalty=1.7,
        )  # fmt: skip
        assert answer == wanted[0, len(prompt) :].tolist()
    assert penalized != greedy
    stop = penalized[0][3]
    wanted = [answer[: answer.index(stop)] if stop in answer else answer for answer in penalized]
    assert collect(decoder, PROMPTS, choice=Choice(repetition_penalty=1.7), stop_ids={stop}) == wanted


def test_a_prompt_ends_when_it_is_stopped(decoder: Decoder, greedy: list[list[int]]) -> None:
    """Before its next token; the others go on."""
    said: list[list[int | None]] = []
    steps = generate_tokens(
        decoder, PROMPTS, max_gen_len=LENGTH, max_seq_len=64, stop_ids=set(),
        stopped=lambda: {1} if len(said) == 4 else {0, 2} if len(said) == 6 else (),
    )  # fmt: skip
    for step in steps:
        said.append(step)
    assert [list(answer) for answer in zip(*said, strict=True)] == [
        greedy[0][:6], [*greedy[1][:4], None, None], greedy[2][:6]
    ]  # fmt: skip


def test_kept_keys_and_values(decoder: Decoder, greedy: list[list[int]]) -> None:
    """The same tokens; only what is new is computed, in a cache that grows; nothing is kept of another decoder."""
    kept, longer, seen = KeptCache(), PROMPTS[0] + greedy[0][:9] + [4, 70, 2], []
    handle = decoder.tok_embeddings.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    try:
        assert collect(decoder, PROMPTS[:1], kept=kept) == greedy[:1]
        assert kept.tokens == PROMPTS[0] + greedy[0][:-1]
        wanted = collect(decoder, [longer], max_gen_len=30)
        seen.clear()
        assert collect(decoder, [longer], max_gen_len=30, kept=kept) == wanted
        assert seen == [3] + [1] * 29
        assert collect(decoder, PROMPTS[1:2], kept=kept) == greedy[1:2]
        assert collect(copy.copy(decoder), PROMPTS[1:2], kept=kept) == greedy[1:2]
    finally:
        handle.remove()


@torch.no_grad()
def test_insets_in_prompts_equal_transformers(pair, decoder: Decoder) -> None:
    """In front, behind the first token, at the end, twice, and none; of kept ones only what is not cached is asked for;
    the penalty knows only tokens.
    """
    table, generator = pair[0].get_input_embeddings().weight, torch.Generator().manual_seed(3)
    insets = {key: torch.randn(rows, 64, generator=generator) * table.std() for key, rows in ((-7, 3), (-8, 20))}
    prompts = [
        [5] + [-7] * 3 + [33, 2],
        [-8] * 20 + [5, 9, 33],
        [1] + [-7] * 3,
        [5] + [-7] * 6 + [-8] * 20 + [4],
        [5, 6],
    ]
    asked: list[list[int]] = []

    def embed(keys: list[int]) -> list[torch.Tensor]:
        asked.append(keys)
        return [insets[key] for key in keys]

    def theirs(prompt: list[int], penalty: float) -> list[int]:
        """Token for token."""
        places = {key: iter(insets[key].repeat(2, 1)) for key in insets}
        x = torch.stack([next(places[token]) if token < 0 else table[token] for token in prompt])
        found: list[int] = []
        while len(found) < LENGTH:
            logits = pair[0](inputs_embeds=x[None]).logits[0, -1]
            held = torch.tensor([token for token in {*prompt, *found} if token >= 0])
            logits[held] = torch.where(logits[held] > 0, logits[held] / penalty, logits[held] * penalty)
            found.append(int(logits.argmax()))
            x = torch.cat([x, table[found[-1]][None]])
        return found

    for penalty in (1.0, 1.7):
        how = {"choice": Choice(repetition_penalty=penalty), "embed": embed}
        wanted = [theirs(prompt, penalty) for prompt in prompts]
        assert collect(decoder, prompts, **how) == wanted and asked.pop() == [-7, -8] and not asked
        assert collect(decoder, prompts[2:3] * 3, **how) == wanted[2:3] * 3 and asked.pop() == [-7]
    kept, wanted = KeptCache(), [theirs(prompt, 1.0) for prompt in prompts]
    for number, keys in ((0, [-7]), (0, None), (3, [-7, -8]), (2, [-7]), (2, [-7]), (4, None)):
        assert collect(decoder, [prompts[number]], kept=kept, embed=embed) == wanted[number : number + 1], number
        assert (asked.pop() if asked else None) == keys, number


def test_a_tiny_nucleus_is_greedy(decoder: Decoder, greedy: list[list[int]]) -> None:
    """top_p 0 leaves only the likeliest token, at any temperature."""
    assert collect(decoder, PROMPTS, choice=Choice(5.0, top_p=0.0)) == greedy


@torch.no_grad()
def test_next_token_logits(pair) -> None:
    """Whole and in fp32."""
    model, decoder = pair
    ids = torch.tensor(PROMPTS[0])
    logits = next_token_logits(decoder, decoder(ids, Sequences.build((7,), decoder.frequencies)))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(ids[None]).logits[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_single_row_of_logits_is_as_near_as_many() -> None:
    """By PyTorch's own bf16 product, which oneDNN's is set aside for and used again after, even where it fails."""
    decoder = Decoder(ModelArgs(dim=96, n_layers=1, n_heads=1, vocab_size=500), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    decoder.output.weight = torch.nn.Parameter(torch.randn(500, 96, generator=generator).bfloat16())
    hidden = torch.randn(3, 96, generator=generator).bfloat16()
    wanted = hidden.double() @ decoder.output.weight.double().t()
    for rows in (1, 3):
        found = next_token_logits(decoder, hidden[:rows])
        assert ((found - wanted[:rows]).abs() <= 2**-8 * wanted[:rows].abs() + 1e-4).all()
    assert torch.backends.mkldnn.enabled
    with pytest.raises(RuntimeError):
        next_token_logits(decoder, hidden[:1, :95])
    assert torch.backends.mkldnn.enabled


@torch.no_grad()
def test_padded_rows_of_the_head_are_cut_off(layout: groups.Layout) -> None:
    """Rows beyond the vocabulary are nobody's token, however likely."""
    decoder = Decoder(ModelArgs(dim=8, n_layers=1, n_heads=1, vocab_size=5), dtype=torch.float32)
    decoder.output.weight = torch.nn.Parameter(torch.cat([torch.zeros(5, 8), torch.ones(1, 8)]))
    assert next_token_logits(decoder, torch.ones(2, 8)).shape == (2, 5)


def test_the_models_own_positions_bound_a_document(decoder: Decoder, greedy: list[list[int]]) -> None:
    """As a smaller max_seq_len would: answers end there, and longer prompts are refused."""
    bounded = copy.copy(decoder)
    scaling = RopeScaling(kind="dynamic", factor=2.0)
    bounded.args = decoder.args.model_copy(update={"rope_scaling": scaling, "max_seq_len": 9})
    assert collect(bounded, PROMPTS) == [greedy[0][:2], greedy[1][:8], greedy[2][:6]]
    with pytest.raises(ConfigError, match="A prompt has 9 tokens; expected 1 to 8"):
        collect(bounded, [[1] * 9])


THEIRS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip


@pytest.mark.parametrize("quant", ["nf4", "fp4_single", "int8"])
def test_packed_greedy_equals_transformers(pair, layout: groups.Layout, tmp_path: Path, quant: str) -> None:
    """In fp32, token for token, the packed model and transformers with the matrices it unpacks to."""
    reference = copy.deepcopy(pair[0])
    reference.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    decoder = Decoder(model_args_of(source), dtype=torch.float32, storage=storage(quant))
    tensors = resolve(decoder, [source], Attachment(), initialize=False)
    fill(decoder, tensors, Attachment(), layout, DataParallel(layout, "sdp", base_is_trained=False))
    for i, layer in enumerate(decoder.layers):
        for ours, theirs in THEIRS.items():
            matrix = reference.get_submodule(f"model.layers.{i}.{theirs}").weight
            unpacked = layer.get_submodule(ours).weight.unpack(torch.float32)
            assert 0 < (unpacked - matrix).norm() < 0.2 * matrix.norm()
            matrix.data.copy_(unpacked)
    answers = collect(decoder.eval(), PROMPTS, max_gen_len=40)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        wanted = reference.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert answer == wanted


def random_values(name: str, shape: tuple[int, ...]) -> Callable[[torch.Generator], torch.Tensor]:
    """A maker of starting values; norms near one."""
    return lambda generator: 0.2 * torch.randn(shape, generator=generator) + ("norm" in name)


@pytest.fixture(scope="module")
def four_bit(layout: groups.Layout) -> Decoder:
    """A random NF4 decoder in bf16."""
    args = ModelArgs(
        dim=128, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=192, vocab_size=96, rotary_layout="halves"
    )
    decoder = Decoder(args, dtype=torch.bfloat16, storage=storage("nf4"))
    initial = {target.name: random_values(target.name, target.whole_shape(1)) for target in targets(decoder)}
    fill(decoder, {}, Attachment(set(), initial), layout, DataParallel(layout, "sdp", base_is_trained=False))
    return decoder.requires_grad_(False).eval()


def test_four_bits_step_by_step_equal_all_at_once(four_bit: Decoder) -> None:
    """Each token is the likeliest after all before it, by the unpacked matrices; and the stored ones did not change."""
    before = {name: p.clone() for name, p in four_bit.named_parameters()}
    answers = list(zip(*generate_tokens(
        four_bit, PROMPTS, max_gen_len=LENGTH, max_seq_len=64, stop_ids=set()
    ), strict=True))  # fmt: skip
    assert all(torch.equal(before[name], p) for name, p in four_bit.named_parameters())
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([*prompt, *answer])
        with torch.enable_grad():  # the way training takes
            hidden = four_bit(ids, four_bit.sequences((len(ids),)))
        logits = next_token_logits(four_bit, hidden)[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
        assert (logits.max(1).values - chosen).max() <= 0.02 * logits.abs().max()  # near ties may fall either way


@needs_kernel
def test_four_bits_in_a_batch_equal_alone(four_bit: Decoder) -> None:
    """In bf16, token for token: prompts that are read together, in groups, and one with the unpacked matrices."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 96, (n,), generator=generator).tolist() for n in (30, 7, 1, 60, 20, 9)]
    together = collect(four_bit, prompts, max_seq_len=100)
    assert together == [collect(four_bit, [prompt], max_seq_len=100)[0] for prompt in prompts]
    assert len({token for answer in together for token in answer}) > 10


@needs_kernel
def test_training_ends_what_was_prepared(four_bit: Decoder) -> None:
    """It is made again when the decoder is asked."""
    list(generate_tokens(four_bit, PROMPTS[:1], max_gen_len=1, max_seq_len=64, stop_ids=set()))
    weights = [m for m in four_bit.modules() if isinstance(m, FourBitWeight)]
    assert sum(weight.prepared is not None for weight in weights) == 4 * len(four_bit.layers)
    four_bit.train()
    assert not any(weight.prepared for weight in weights)
    four_bit.eval()
