"""The memory plan against what a step allocates, and against published sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from accessory import kernels
from accessory.data.batch import PackedBatch
from accessory.kernels.avx512 import packed_products
from accessory.memory.plan import StepMemory, device_memory, parameter_counts
from accessory.memory.recompute import recompute_layers
from accessory.method import METHODS
from accessory.model.args import ModelArgs
from accessory.model.decoder import Decoder
from accessory.model.loss import CHUNK, cross_entropy_sum
from accessory.model.teacher import Teacher
from accessory.optim import build_optimizer
from accessory.parallel.groups import Layout
from accessory.quant import PackedWeight, storage, workspace
from accessory.quant.four_bit import FourBitWeight
from accessory.run.integer_moves import IntegerMoves
from tests.memory.allocated_peak import AllocatedPeak
from tests.memory.small_models import LORA, NORM_BIAS, NORM_BIAS_LORA, SHAPES, SMALL, built, filled, planned, step
from tools.model_sizes import LLAMA_2

P = {"7B": 6_476_005_376, "13B": 12_687_769_600, "70B": 68_451_041_280}  # weights of the blocks' linears
EMBEDDING = {"7B": 131_072_000, "13B": 163_840_000, "70B": 262_144_000}  # and as many in the head
NORMS = {"7B": 266_240, "13B": 414_720, "70B": 1_318_912}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "quant", "gigabytes"),
    [
        ("7B", "nf4", 3.866), ("13B", "nf4", 7.201), ("70B", "nf4", 36.363),
        ("7B", "nf4_single", 4.168), ("13B", "nf4_single", 7.793), ("70B", "nf4_single", 39.555),
    ],
)  # fmt: skip
def test_frozen_weights_of_llama2(layout: Layout, size: str, quant: str, gigabytes: float) -> None:
    """Published totals have norms in bf16 and no offsets; here norms are fp32 and each nested matrix has an offset."""
    args = ModelArgs(vocab_size=32000, **LLAMA_2[size])
    decoder, attachment = built(args, LORA, quant=quant)
    weights = planned(decoder, attachment, layout).weights
    linears = 7 * args.n_layers
    if quant == "nf4":
        packed = P[size] // 2 + P[size] // 64 + 4 * P[size] // (64 * 256)
        extra = 2 * NORMS[size] + 4 * linears
    else:
        packed, extra = P[size] // 2 + 4 * P[size] // 64, 2 * NORMS[size]
    assert weights == packed + 2 * 2 * EMBEDDING[size] + 2 * NORMS[size] + extra
    assert (weights - extra) / 1e9 == pytest.approx(gigabytes, abs=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "count", "megabytes"), [("7B", 1_626_112, 26), ("13B", 2_544_640, 41), ("70B", 8_036_352, 129)]
)
def test_trained_part_of_llama2(layout: Layout, size: str, count: int, megabytes: int) -> None:
    """NormBias: fp32 weights, gradients and two moments, the norms counted here and not among the frozen."""
    args = ModelArgs(vocab_size=32000, **LLAMA_2[size])
    plan = planned(*built(args, NORM_BIAS), layout)
    assert (plan.trainable, plan.gradients, plan.optimizer) == (4 * count, 4 * count, 8 * count)
    assert round((plan.trainable + plan.gradients + plan.optimizer) / 1e6) == megabytes
    assert planned(*built(args, LORA), layout).weights - plan.weights == 4 * NORMS[size]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "megabytes"), [("7B", 90), ("13B", 142), ("70B", 470)])
def test_buffer_is_the_largest_unpacked_matrix(layout: Layout, size: str, megabytes: int) -> None:
    """In bf16, twice where it may be unpacked ahead: on one GPU, if no step changes it.

    There is none where nothing is packed, and less where this CPU's kernel unpacks some columns at a time.
    """
    args, gpu = ModelArgs(vocab_size=32000, **LLAMA_2[size]), replace(layout, device=torch.device("cuda"))
    assert round(planned(*built(args, NORM_BIAS), gpu).buffers / 2e6) == megabytes
    assert round(planned(*built(args, NORM_BIAS), replace(gpu, dp_size=2)).buffers / 1e6) == megabytes
    assert planned(*built(args, NORM_BIAS, quant=None), gpu).buffers == 0
    if kernels.computing(layout.device, torch.bfloat16) == "avx512":
        assert planned(*built(args, NORM_BIAS), layout).buffers < torch.get_num_threads() * 6e6


def test_filled_bytes_are_the_planned(layout: Layout) -> None:
    """Weights and trainables, against the storages of a filled decoder; gradients against those of a step."""
    decoder, attachment = filled(layout, NORM_BIAS_LORA)
    plan = planned(decoder, attachment, layout)
    sizes = {True: 0, False: 0}
    for parameter in decoder.parameters():
        sizes[parameter.requires_grad] += parameter.untyped_storage().nbytes()
    assert (plan.trainable, plan.weights) == (sizes[True], sizes[False])
    step(decoder)[1].backward()
    assert plan.gradients == sum(p.grad.untyped_storage().nbytes() for p in decoder.parameters() if p.requires_grad)


def test_logits_are_one_chunk(layout: Layout) -> None:
    """Narrow, and a wide copy where no kernel makes the loss, of a chunk's tokens at most; a master head is cast."""
    decoder, attachment = built(SMALL, NORM_BIAS)
    each = 2 if kernels.computing(layout.device, torch.bfloat16) == "avx512" else 6
    assert planned(decoder, attachment, layout, tokens=10 * CHUNK).logits == CHUNK * 96 * each
    assert planned(decoder, attachment, layout, tokens=10).logits == 10 * 96 * each
    gpu = replace(layout, device=torch.device("cuda"))
    aligned = 128  # numbers from one row to the next
    assert planned(decoder, attachment, gpu, tokens=10).logits == 10 * (aligned * 2 + 96 * 4)
    full = built(SMALL, {}, method="full", quant=None)
    assert planned(*full, layout, tokens=10).logits == 10 * 96 * each + 96 * 64 * 2


def test_data_parallel_shares() -> None:
    """sdp shares the optimizer, fsdp the frozen base too; what is used is put together beside the shares."""
    decoder, attachment = built(SMALL, NORM_BIAS)
    alone, four = Layout(), Layout(world_size=4, dp_size=4)
    one, sdp = planned(decoder, attachment, alone), planned(decoder, attachment, four)
    fsdp = planned(decoder, attachment, four, data_parallel="fsdp")
    assert sdp.weights == one.weights
    assert (sdp.optimizer, sdp.gradients) == (one.optimizer // 4, one.gradients)
    assert sdp.trainable == one.trainable // 4 + one.trainable
    block = sum(
        p.numel() * p.element_size()
        for name, p in decoder.named_parameters()
        if name.startswith("layers.0.") and name not in attachment.trainable
    )
    assert fsdp.weights == one.weights // 4 + 2 * block
    final_norm = 4 * decoder.args.dim
    in_a_block = (one.trainable - final_norm) // len(decoder.layers)
    assert fsdp.trainable == one.trainable // 4 + 2 * in_a_block + final_norm


def test_model_parallel_counts_are_the_whole_models() -> None:
    """Over all ranks; what is cut counts once."""
    args = SMALL.model_copy(update={"n_kv_heads": 4})
    counts = []
    for ranks in (1, 2, 4):
        decoder = Decoder(args, dtype=torch.bfloat16, ranks=ranks, storage=storage("nf4"))
        attachment = METHODS["peft"](METHODS["peft"].Settings(lora_rank=8)).attach(decoder)
        counts.append(parameter_counts(decoder, attachment))
    plain = built(args, NORM_BIAS_LORA, quant=None)
    trained = sum(p.numel() for name, p in plain[0].named_parameters() if name in plain[1].trainable)
    assert counts == [(trained, sum(p.numel() for p in plain[0].parameters()))] * 3


def test_table(layout: Layout) -> None:
    """Every part and the total, with its unit, against what there is."""
    plan = planned(*built(SMALL, NORM_BIAS), layout)
    assert plan.total == plan.weights + plan.trainable + plan.optimizer + plan.buffers + plan.working
    lines = plan.table("a test", 80_000_000_000).splitlines()
    assert lines[0] == "memory plan per rank: a test"
    assert [line.split()[0] for line in lines[1:]] == [
        "weights", "trainable", "gradients", "optimizer", "activations", "logits", "buffers", "working",
        "total",
    ]  # fmt: skip
    assert lines[-1].endswith("GB of 80.0 GB")
    assert plan.table("a test", None).endswith("GB")


def test_device_memory() -> None:
    """This machine has some."""
    assert device_memory(torch.device("cpu")) > 1e8


MIDDLE = ModelArgs(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, hidden_dim=704, vocab_size=2048)

STEPS = {
    "LoRA": {"settings": LORA},
    "LoRA, plain, one document": {"settings": LORA, "quant": None, "lengths": (900,)},
    "NormBias, fp32": {"settings": NORM_BIAS, "dtype": torch.float32},
    "NormBias, half recomputed": {"settings": NORM_BIAS, "recomputed": 3},
    "NormBiasLoRA, recomputed, 8 bits, one long document": {
        "settings": NORM_BIAS_LORA,
        "recomputed": 6,
        "optim": "adamw8bit",
        "lengths": (1500,),
    },
    "full": {"settings": {}, "method": "full", "quant": None},
    "full, recomputed, 8 bits": {
        "settings": {},
        "method": "full",
        "quant": None,
        "recomputed": 6,
        "optim": "adamw8bit",
    },
    "full, two micro-batches": {"settings": {}, "method": "full", "quant": None, "micro_batches": 2},
    "scales of NF4": {"settings": NORM_BIAS, "quant": "nf4_scales"},
    "LoRA and scales of NF4, recomputed": {"settings": LORA, "quant": "nf4_scales", "recomputed": 6},
    "LoRA, codes in groups, fp32": {"settings": LORA, "quant": "int3_g64", "dtype": torch.float32},
    "scales and zeros, fp32": {"settings": {}, "method": "qsft", "quant": "int2_g64", "dtype": torch.float32},
    "integers, scales and zeros": {
        "settings": {"tune": "quantized", "galore_rank": 16},
        "method": "qsft",
        "quant": "int2_g64",
        "optim": "adamw8bit",
    },
    "integers, two micro-batches": {
        "settings": {"tune": "integers", "galore_rank": 64},
        "method": "qsft",
        "quant": "int3_g64",
        "micro_batches": 2,
    },
    "LoRA in two blocks": {"settings": {**LORA, "lora_layers": "3,4"}},
    "LoRA, two micro-batches, recomputed": {"settings": LORA, "recomputed": 6, "micro_batches": 2},
    "scales": {"settings": {"scale_tuning": True}},
    "scales and LoRA, recomputed": {"settings": {"scale_tuning": True, "lora_rank": 8}, "recomputed": 6},
    "prefixes, one long document": {
        "settings": {"prefix_len": 4, "norm_tuning": False}, "method": "adapter", "lengths": (900,),
    },
    "prefixes and LoRA, recomputed": {"settings": {"lora_rank": 8}, "method": "adapter", "recomputed": 6},
    "prefixes of some blocks, fp32": {
        "settings": {"prefix_layers": 2, "prefix_len": 30}, "method": "adapter", "dtype": torch.float32,
    },
    "LoRA, a teacher": {"settings": LORA, "recomputed": 6, "teacher": {}},
    "full, a packed teacher, wider": {
        "settings": {}, "method": "full", "quant": None, "teacher": {"dim": 512, "quant": "nf4"},
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_total_is_what_a_step_allocates(layout: Layout, case: dict) -> None:
    """Forward, backward and optimizer of a second step, with all that is held: within 5 %."""
    planned_total, measured = planned_and_measured(layout, MIDDLE, **case)
    assert planned_total == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("lengths", [(300, 200, 100), (500, 40, 40, 20), (8,) * 75])
def test_total_of_unequal_documents(layout: Layout, lengths: tuple[int, ...]) -> None:
    """The plan takes all to be as long as the longest: it is no less than what is allocated, and not a tenth more."""
    planned_total, measured = planned_and_measured(layout, MIDDLE, settings=LORA, lengths=lengths)
    assert 0.99 * measured < planned_total < 1.1 * measured


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab_size", [512, 12000])
def test_total_of_full_training(layout: Layout, vocab_size: int, tied: bool, optim: str, micro_batches: int) -> None:
    """As `test_total_is_what_a_step_allocates`, where blocks or vocabulary have most of the gradients."""
    args = MIDDLE.model_copy(update={"vocab_size": vocab_size, "tie_word_embeddings": tied})
    planned_total, measured = planned_and_measured(
        layout, args, settings={}, method="full", quant=None, optim=optim, micro_batches=micro_batches,
        recomputed=6, lengths=(60, 40),
    )  # fmt: skip
    assert planned_total == pytest.approx(measured, rel=0.05)


def test_total_where_the_embedding_is_last(layout: Layout) -> None:
    """Tied to the head, and with many blocks before it: the worst moment is when the two gradients are added."""
    args = MIDDLE.model_copy(update={"n_layers": 12, "vocab_size": 8192, "tie_word_embeddings": True})
    full = {"settings": {}, "method": "full", "quant": None, "recomputed": 12, "lengths": (60, 40)}
    planned_total, measured = planned_and_measured(layout, args, **full)
    assert planned_total == pytest.approx(measured, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [0, 6])
@pytest.mark.parametrize("name", ["OPT", "BLOOM", "GPT-NeoX", "GLM-4", "Qwen 3", "Mistral"])
def test_total_of_other_blocks(layout: Layout, name: str, recomputed: int) -> None:
    """As `test_total_is_what_a_step_allocates`."""
    args = ModelArgs(**{**MIDDLE.model_dump(), **SHAPES[name]})
    planned_total, measured = planned_and_measured(layout, args, settings=NORM_BIAS_LORA, recomputed=recomputed)
    assert planned_total == pytest.approx(measured, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", ["none", "all"])
@pytest.mark.parametrize("tail", [0, 1])
@pytest.mark.parametrize(
    ("name", "quant", "downsample"),
    [
        ("LLaMA", "nf4", "adapter"), ("LLaMA", None, "avgpool"), ("OPT", "nf4", "avgpool"), ("OPT", None, "adapter"),
        ("BLOOM", "nf4", "adapter"), ("BLOOM", None, "avgpool"),
    ],
)  # fmt: skip
def test_total_of_side_tuning(
    layout: Layout, name: str, quant: str | None, downsample: str, tail: int, recomputed: str
) -> None:
    """The base has no backward, beside it are narrower blocks: the worst moment may be a forward of the base's."""
    args = ModelArgs(**{**MIDDLE.model_dump(), **SHAPES.get(name, {}), "vocab_size": 512})
    settings = {"r": 4, "downsample": downsample, "tail": tail}
    planned_total, measured = planned_and_measured(
        layout, args, settings=settings, method="qst", quant=quant, recomputed=(12 - tail) * (recomputed == "all")
    )
    assert planned_total == pytest.approx(measured, rel=0.03)


SIDES = {
    "released": {"settings": {"start": "released"}},
    "8-bit states": {"settings": {"r": 4, "state_bits": 8}},
    "norms and dropout": {"settings": {"r": 4, "add_layer_norm_before_adapter": True, "dropout": 0.1}},
    "wide and linear": {"settings": {"r": 2, "downsample": "linear"}, "lengths": (100,)},
    "two micro-batches": {"settings": {"r": 2, "downsample": "linear"}, "micro_batches": 2, "lengths": (100,)},
    "fp32, one long document": {"settings": {"r": 4}, "dtype": torch.float32, "lengths": (1200,)},
    "every third block": {"settings": {"r": 4, "side_layers": 3, "embedding_downsample": "own"}},
    "a tail alone": {"settings": {"side_layers": 0, "tail": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SIDES.values(), ids=SIDES)
def test_total_of_other_sides(layout: Layout, case: dict) -> None:
    """As `test_total_of_side_tuning`."""
    args = MIDDLE.model_copy(update={"vocab_size": 512})
    planned_total, measured = planned_and_measured(layout, args, method="qst", **case)
    assert planned_total == pytest.approx(measured, rel=0.05)


def planned_and_measured(
    layout: Layout,
    args: ModelArgs,
    *,
    settings: dict,
    method: str = "peft",
    quant: str | None = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    lengths: tuple[int, ...] = (300, 300),
    recomputed: int = 0,
    micro_batches: int = 1,
    optim: str = "adamw",
    teacher: dict | None = None,
) -> tuple[int, int]:
    """Bytes of a training step: the plan's total, and what is held together with the peak of what is allocated."""
    options = {"method": method, "quant": quant, "dtype": dtype}
    decoder, attachment = filled(layout, settings, args=args, **options)
    recompute_layers(decoder, recomputed, offload=False, device=layout.device)
    parameters = {name: p for name, p in decoder.named_parameters() if name in attachment.trainable}
    optimizer = build_optimizer(optim, parameters, 1e-4, 0.0)
    tokens = sum(lengths)
    taught = None if teacher is None else taught_by(layout, args, dtype, **teacher)
    ids, labels = (
        torch.randint(0, args.vocab_size, (tokens,), generator=torch.Generator().manual_seed(i)) for i in (0, 1)
    )

    rule = METHODS[method](METHODS[method].Settings(**settings)).integer_rule
    moves = IntegerMoves(decoder, replace(rule, every=1, basis_every=1), layout) if rule else None

    def step() -> None:
        if moves:
            moves.begin(1)
            moves.moves_now = bool(optimizer.state)
        for _ in range(micro_batches):
            teaching = taught.teach(PackedBatch(ids, labels, lengths, (), (0,) * len(lengths))) if taught else None
            hidden = decoder(ids, decoder.sequences(lengths).with_labels(labels))
            loss = cross_entropy_sum(hidden, decoder.head_weight, labels, args.vocab_size, teaching=teaching)
            del hidden, teaching
            (loss / tokens).backward()
        if moves:
            with torch.no_grad():
                moves.move(optimizer, 1.0, tokens, lambda: 2.0)
        optimizer.step()
        if moves:
            moves.clipped_by(1.0)
            moves.end(optimizer, 1, skipped=False)
        optimizer.zero_grad(set_to_none=True)

    workspace._pieces.clear()
    packed_products._kept.memory = torch.empty(0, dtype=torch.uint8)
    step()  # makes the optimizer's state and the memory that unpacked matrices share
    moments = [value for state in optimizer.state.values() for value in state.values()]
    theirs = [] if taught is None else [*taught.decoder.parameters()]
    held = sum(t.untyped_storage().nbytes() for t in (*decoder.parameters(), *moments, *theirs))
    with AllocatedPeak() as peak:
        step()
    plan = StepMemory(
        decoder, attachment, layout, tokens=tokens, longest=max(lengths), micro_batches=micro_batches,
        data_parallel="sdp", optim=optim, teacher=(taught.decoder, frozenset()) if taught else None,
    ).plan(recomputed)  # fmt: skip
    shared = packed_products._kept.memory.nbytes + sum(piece.memory.nbytes for piece in workspace._pieces.values())
    packed = [module for module in decoder.modules() if isinstance(module, PackedWeight)]
    unpacking = [m.unpack_bytes(layout.device) for m in packed if not m.product_kernel([m], dtype, layout.device)]
    assert plan.buffers == shared + max(unpacking, default=0)
    return plan.total, held + shared + peak.bytes


def taught_by(layout: Layout, args: ModelArgs, dtype: torch.dtype, dim: int = 256, quant: str | None = None) -> Teacher:
    """Another model, as wide as that."""
    decoder, _ = filled(layout, {}, args=args.model_copy(update={"dim": dim}), quant=quant, dtype=dtype)
    return Teacher(decoder.requires_grad_(False).eval(), args.vocab_size, 0.5, 1.0)


def test_a_teacher_that_shares_and_is_shared_out(layout: Layout) -> None:
    """What the student holds already counts once; under fsdp a share of the blocks, and two that are gathered."""
    decoder, attachment = built(SMALL, LORA, quant=None)
    plain, _ = built(SMALL, {}, quant=None)
    sizes = {name: p.nbytes for name, p in plain.named_parameters()}
    alone = planned(decoder, attachment, layout)
    shared = planned(decoder, attachment, layout, teacher=(plain, sizes.keys()))
    apart = planned(decoder, attachment, layout, teacher=(plain, frozenset()))
    assert (alone.teacher, shared.teacher) == (0, 0) and apart.teacher == sum(sizes.values())
    assert apart.weights == alone.weights and apart.total - shared.total == apart.teacher
    assert "  teacher " in apart.table("a test", None) and "teacher" not in alone.table("a test", None)
    block = sum(size for name, size in sizes.items() if name.startswith("layers.0."))
    two = Layout(world_size=2, dp_size=2)
    cut = planned(decoder, attachment, two, data_parallel="fsdp", teacher=(plain, frozenset()))
    assert cut.teacher == apart.teacher - 3 * block + 3 * block // 2 + 2 * block


def test_offloaded_inputs() -> None:
    """All but three are in host memory."""
    options = {"tokens": 2000, "checkpointing": 6}
    decoder, attachment = built(MIDDLE, LORA)
    whole = planned(decoder, attachment, Layout(), **options)
    moved = planned(decoder, attachment, Layout(), offload=True, **options)
    assert whole.activations - moved.activations == 3 * 2000 * 256 * 2
    assert moved.total < whole.total


# Of the published accounts: codes, and statistics with two scales of blocks of 64 and of 256.
CODES = {"7B": 3_238_002_688, "13B": 6_343_884_800, "70B": 34_225_520_640}
STATISTICS = {"7B": 102_768_640, "13B": 201_344_000, "70B": 1_086_259_200}
LORA_16 = {"7B": 39_976_960, "13B": 62_586_880, "70B": 207_093_760}


@pytest.mark.slow
@pytest.mark.parametrize("size", LLAMA_2)
def test_bytes_of_llama2(layout: Layout, size: str) -> None:
    """Every part of the frozen weights, to the byte; an offset a matrix is all that no account has."""
    decoder, attachment = built(ModelArgs(vocab_size=32000, **LLAMA_2[size]), {**LORA, "lora_rank": 16})
    matrices = [m for m in decoder.modules() if isinstance(m, FourBitWeight)]
    norms = [p for name, p in decoder.named_parameters() if name.endswith("norm.weight")]
    assert sum(m.shape.numel() for m in matrices) == P[size]
    assert decoder.tok_embeddings.weight.numel() == decoder.output.weight.numel() == EMBEDDING[size]
    assert sum(p.numel() for p in norms) == NORMS[size]
    assert sum(m.codes.nbytes for m in matrices) == CODES[size]
    assert sum(m.scales.nbytes + m.nested_scales.nbytes for m in matrices) == STATISTICS[size]
    plan = planned(decoder, attachment, layout)
    packed = CODES[size] + STATISTICS[size] + 4 * len(matrices)
    assert plan.weights == packed + 2 * 2 * EMBEDDING[size] + 4 * NORMS[size]
    assert plan.trainable == 4 * LORA_16[size]
