"""How fast models of LLaMA-2's shapes train and answer here, made of random numbers on the card; 70B comes last.

Beside transformers and peft where they are installed, whose model is made of random numbers in the same way.
"""

from __future__ import annotations

import gc
import time
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from accessory.checkpoint.training_state import Progress
from accessory.engine import Engine
from accessory.memory.recompute import recompute_layers
from accessory.run.determinism import algorithms_as_before, fix_order_of_sums
from tools.benchmark import UNTIMED_STEPS, beside_ideal, figures_of, run_steps
from tools.benchmarking import time_shares
from tools.benchmarking.decoding import Decoding
from tools.benchmarking.training import Training
from tools.gpu_checks.check import Findings, Ground, Skipped, check
from tools.gpu_checks.rates import begin_peak, peak_bytes, synchronize
from tools.model_sizes import args_of

STEPS = 6  # of each length; the first two are not timed
MOST_70B = 40e9
"""Bytes that training 70B by NormBias on 512 tokens shall stay below."""


def _engine(ground: Ground, found: Findings, method: str, lengths: tuple[int, ...], size: str = "7B") -> Engine:
    """That trains on NF4 in bf16: `STEPS` steps of one document of each of these lengths, all its tokens learned."""
    lengths = tuple(ground.pick(length, 64) for length in lengths)
    training = Training(
        model=ground.pick(size, "tiny"), data=None, steps=STEPS * len(lengths), batch_size=1,
        seq=tuple(length for length in lengths for _ in range(STEPS)), supervised=1.0, max_words=max(lengths),
        method=method, rank=None, adapter=None, quant_type="nf4", precision="bf16", lr=2e-4, optim="adamw",
        checkpointing="none", share_prefixes=True,
    )  # fmt: skip
    before, began = begin_peak(ground.device), time.perf_counter()
    engine = training.engine(ground.layout)
    synchronize(ground.device)
    found.figures["made_in_s"] = round(time.perf_counter() - began, 1)
    found.figures["peak_while_made_gb"] = round((peak_bytes(ground.device) - before) / 1e9, 2)
    return engine


def _train(
    ground: Ground, found: Findings, engine: Engine, length: int, *, at: int = 0, slowest: float = 0.0, note: str = ""
) -> None:
    """Measure the steps of the length that is number `at`; the figures are those of `tools/benchmark.py train`.

    slowest: tokens/s that an H200 must reach at least. note: of what is otherwise than by default.
    """
    with found.case(what := f"{length} tokens{note}"):
        begin_peak(ground.device)
        reports = run_steps(engine, STEPS, first=at * STEPS)
        told = figures_of(engine, reports)
        rate, losses = told["tokens_per_s"], told["losses"]
        found.expect(all(loss == loss and loss < 20 for loss in losses), f"{what}: losses are {losses}")
        if ground.cuda and not ground.tiny and "H200" in torch.cuda.get_device_name(ground.device):
            found.expect(
                rate >= slowest, f"{what}: {rate:.0f} tokens/s; expected {slowest:.0f} at least, and twice that"
            )
        ideal = beside_ideal(engine, ground.layout, reports)
        shares = time_shares.measure(lambda: engine.step(Progress(step=(at + 1) * STEPS - 1)), engine)
        found.figures[what] = {
            "tokens_per_s": rate,
            "peak_gb": round(told["peak_bytes"] / 1e9, 2) if ground.cuda else None,
            **{name: ideal[name] for name in ("ideal_tokens_per_s", "ratio_to_ideal")},
            "shares": {name: round(share, 1) for name, share in shares.items()},
        }  # fmt: skip


@check(22, needs_cuda=True)
def lora(ground: Ground, found: Findings) -> None:
    """7B, LoRA of rank 16 on every linear: 4,096 tokens a step, 512; then with all layers recomputed; deterministic."""
    engine = _engine(ground, found, "lora", (4096, 512))
    _train(ground, found, engine, 4096, slowest=8000.0)
    _train(ground, found, engine, 512, at=1)
    with found.case("deterministic"), algorithms_as_before():
        fix_order_of_sums(True, ground.device)
        engine.step(Progress())
        synchronize(ground.device)
        began = time.perf_counter()
        tokens = sum(engine.step(Progress(step=step))[0].tokens for step in range(3))
        found.figures["deterministic_tokens_per_s"] = round(tokens / (time.perf_counter() - began), 1)
    _recompute_all(engine)
    _train(ground, found, engine, 4096, note=", all recomputed")


def _recompute_all(engine: Engine) -> None:
    decoder = engine.model.llma
    recompute_layers(decoder, len(list(decoder.blocks())), offload=False, device=engine.parameters.device)


@check(14, needs_cuda=True, by_name=True)
def normbias(ground: Ground, found: Findings) -> None:
    """7B, NormBias, 4,096 tokens a step, and 512."""
    engine = _engine(ground, found, "normbias", (4096, 512))
    _train(ground, found, engine, 4096, slowest=8000.0)
    _train(ground, found, engine, 512, at=1)


@check(14, needs_cuda=True)
def qst(ground: Ground, found: Findings) -> None:
    """7B, side tuning as a run has it by default, 4,096 tokens a step, and 512."""
    engine = _engine(ground, found, "qst", (4096, 512))
    _train(ground, found, engine, 4096, slowest=12000.0)
    _train(ground, found, engine, 512, at=1)


@check(7, needs_cuda=True, by_name=True)
def decoding_1(ground: Ground, found: Findings) -> None:
    """7B in NF4, one prompt of 128 tokens and 128 new ones."""
    _decode(ground, found, 1)


@check(7, needs_cuda=True)
def decoding_8(ground: Ground, found: Findings) -> None:
    """The same of eight prompts."""
    _decode(ground, found, 8)


def _decode(ground: Ground, found: Findings, prompts: int) -> None:
    count = ground.pick(128, 6)
    how = Decoding(
        model=ground.pick("7B", "tiny"), data=None, batch_size=prompts, prompt_tokens=count, new_tokens=count,
        quant_type="nf4", precision="bf16",
    )  # fmt: skip
    run = how.by_us(ground.layout)
    # The first tokens compile kernels and record graphs; the median of the later ones is what a token takes.
    gaps = sorted(b - a for a, b in zip(run.stamps, run.stamps[1:], strict=False))
    middle = gaps[len(gaps) // 2]
    found.figures |= {
        "tokens_per_s": round(prompts / middle, 1), "ms_per_token": round(1e3 * middle, 3),
        "slowest_ms": round(1e3 * gaps[-1], 1), "prompt_ms": round(1e3 * run.stamps[0], 1),
        "read_gb_per_token": round(run.read_bytes / 1e9, 3), "gb_per_s": round(run.read_bytes / middle / 1e9, 1),
    }  # fmt: skip
    found.expect(len(run.answers) == prompts and all(len(a) == count for a in run.answers), "answers are cut short")


@check(15, needs_cuda=True)
def peer_lora_4096(ground: Ground, found: Findings) -> None:
    """transformers, bitsandbytes and peft: 7B in NF4, LoRA of rank 16 on every linear, 4,096 tokens a step."""
    model = _peer(ground)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    for tokens in ground.pick((4096, 512), (64, 32)):
        with found.case(f"{tokens} tokens"):
            ids = torch.randint(model.config.vocab_size, (1, tokens), device=ground.device)
            before = begin_peak(ground.device)

            def step(ids: Tensor = ids) -> float:
                """One, and its loss."""
                loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                return loss.item()

            for _ in range(UNTIMED_STEPS):
                step()
            began = time.perf_counter()
            losses = [step() for _ in range(STEPS - UNTIMED_STEPS)]
            rate = len(losses) * tokens / (time.perf_counter() - began)
            found.figures[f"{tokens}_tokens_per_s"] = round(rate, 1)
            found.figures[f"{tokens}_peak_above_model_gb"] = round((peak_bytes(ground.device) - before) / 1e9, 2)


@check(15, needs_cuda=True)
def peer_decoding(ground: Ground, found: Findings) -> None:
    """transformers and bitsandbytes: answers of one prompt and of eight."""
    model = _peer(ground).eval()
    count = ground.pick(128, 6)
    for prompts in (1, 8):
        with found.case(f"{prompts} prompts"):
            ids = torch.randint(model.config.vocab_size, (prompts, count), device=ground.device)
            settings = {
                "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
            }  # fmt: skip
            seconds = {}
            for new in (2, count):
                with torch.no_grad():
                    model.generate(ids, max_new_tokens=2, **settings)
                    began = time.perf_counter()
                    model.generate(ids, max_new_tokens=new, **settings)
                    synchronize(ground.device)
                    seconds[new] = time.perf_counter() - began
            each = (seconds[count] - seconds[2]) / (count - 2)
            found.figures[f"{prompts}_prompts"] = {
                "ms_per_token": round(1e3 * each, 2), "tokens_per_s": round(prompts / each, 1),
            }  # fmt: skip


def _peer(ground: Ground) -> nn.Module:
    """transformers' LLaMA of 7B's shape: its linears in NF4 by bitsandbytes, of random numbers, with peft's LoRA.

    Raises `Skipped` where one of the three is not installed.
    """
    missing = [name for name in ("transformers", "peft", "bitsandbytes") if find_spec(name) is None]
    if missing:
        raise Skipped(f"needs {', '.join(missing)}")
    import bitsandbytes
    import peft
    import transformers

    args = args_of(ground.pick("7B", "tiny"))
    config = transformers.LlamaConfig(
        vocab_size=args.vocab_size, hidden_size=args.dim, intermediate_size=args.hidden_dim,
        num_hidden_layers=args.n_layers, num_attention_heads=args.n_heads, num_key_value_heads=args.n_kv_heads,
        max_position_embeddings=8192,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    for name in linears:
        _quantize(model, name, bitsandbytes, ground.device)
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                made = torch.empty(parameter.shape, dtype=parameter.dtype, device=ground.device)
                setattr(module, leaf, nn.Parameter(made.normal_(0, 0.02) if made.dim() > 1 else made.fill_(1)))
    fresh = type(model.model.rotary_emb)(config=config)
    model.model.rotary_emb = fresh.to(ground.device)
    model.is_loaded_in_4bit = True
    gc.collect()
    return peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def _quantize(model: nn.Module, name: str, bitsandbytes: object, device: torch.device) -> None:
    """Put a matrix of random numbers in NF4, with scales of scales, in the place of a linear."""
    parent, _, leaf = name.rpartition(".")
    old = getattr(owner := model.get_submodule(parent), leaf)
    new = bitsandbytes.nn.Linear4bit(
        old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True,
        quant_type="nf4", device="meta",
    )  # fmt: skip
    numbers = torch.empty(old.weight.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    packed = bitsandbytes.nn.Params4bit(
        numbers, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=64, module=new
    )
    new.weight = packed._quantize(device)
    setattr(owner, leaf, new)


@check(32, needs_cuda=True, by_name=True)
def normbias_70b(ground: Ground, found: Findings) -> None:
    """70B, NormBias, 512 tokens a step; and with all layers recomputed, where its peak shall stay below 40 GB."""
    engine = _engine(ground, found, "normbias", (512,), "70B")
    _train(ground, found, engine, 512)
    _recompute_all(engine)
    _train(ground, found, engine, 512, note=", all recomputed")
    peak = found.figures.get("512 tokens, all recomputed", {}).get("peak_gb")
    if ground.cuda and not ground.tiny and peak is not None:
        found.expect(peak < MOST_70B / 1e9, f"the peak is {peak} GB")


CHECKS = [lora, normbias, qst, decoding_1, decoding_8, peer_lora_4096, peer_decoding, normbias_70b]
