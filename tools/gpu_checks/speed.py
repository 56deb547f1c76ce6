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
from accessory.run.determinism import algorithms_as_before, fix_order_of_sums
from tools.benchmark import UNTIMED_STEPS, beside_ideal, figures_of, run_steps
from tools.benchmarking import time_shares
from tools.benchmarking.decoding import Decoding
from tools.benchmarking.training import Training
from tools.gpu_checks.check import Findings, Ground, Skipped, check
from tools.gpu_checks.rates import begin_peak, peak_bytes, synchronize
from tools.model_sizes import args_of

STEPS = 6  # the first two are not timed
MOST_70B = 40e9
"""Bytes that training 70B by NormBias on 512 tokens shall stay below."""
SLOWEST = {"lora_4096": 8000.0, "normbias_4096": 8000.0, "qst_4096": 12000.0}
"""Tokens/s of 7B on an H200, half of what is expected: below it something is at fault."""


def _training(ground: Ground, method: str, tokens: int, size: str = "7B", **changes: object) -> Training:
    """Steps of one document of `tokens` random tokens, all of them learned, on NF4 in bf16."""
    length = ground.pick(tokens, 64)
    plain = {
        "model": ground.pick(size, "tiny"), "data": None, "steps": STEPS, "batch_size": 1, "seq": (length,),
        "supervised": 1.0, "max_words": length, "method": method, "rank": None, "adapter": None, "quant_type": "nf4",
        "precision": "bf16", "lr": 2e-4, "optim": "adamw", "checkpointing": "none", "share_prefixes": True,
    }  # fmt: skip
    return Training(**plain | changes)


def _train(ground: Ground, found: Findings, method: str, tokens: int, size: str = "7B", **changes: object) -> Engine:
    """Measure it; the figures are those of `tools/benchmark.py train`."""
    before = begin_peak(ground.device)
    began = time.perf_counter()
    engine = _training(ground, method, tokens, size, **changes).engine(ground.layout)
    synchronize(ground.device)
    found.figures["made_in_s"] = round(time.perf_counter() - began, 1)
    found.figures["peak_while_made_gb"] = round((peak_bytes(ground.device) - before) / 1e9, 2)
    begin_peak(ground.device)
    reports = run_steps(engine, STEPS)
    figures = figures_of(engine, reports)
    found.figures["tokens_per_s"] = figures["tokens_per_s"]
    found.figures["peak_gb"] = round((figures["peak_bytes"] - before) / 1e9, 2) if ground.cuda else None
    losses = figures["losses"]
    found.expect(all(loss == loss and loss < 20 for loss in losses), f"losses are {losses}")
    if ground.cuda and not ground.tiny and "H200" in torch.cuda.get_device_name(ground.device):
        least, rate = SLOWEST.get(f"{method}_{tokens}", 0.0), figures["tokens_per_s"]
        found.expect(rate >= least, f"{rate:.0f} tokens/s; expected {least:.0f} at least, and twice that")
    with found.case("the ideal"):
        told = beside_ideal(engine, ground.layout, reports)
        found.figures |= {name: told[name] for name in ("ideal_tokens_per_s", "ratio_to_ideal")}
    with found.case("shares of the time"):
        shares = time_shares.measure(lambda: engine.step(Progress(step=STEPS - 1)), engine)
        found.figures["shares"] = {name: round(share, 1) for name, share in shares.items()}
    return engine


@check(14, needs_cuda=True)
def lora_4096(ground: Ground, found: Findings) -> None:
    """7B, LoRA of rank 16 on every linear, 4,096 tokens a step; then the same steps with `--deterministic`."""
    engine = _train(ground, found, "lora", 4096)
    with algorithms_as_before():
        fix_order_of_sums(True, ground.device)
        engine.step(Progress())
        synchronize(ground.device)
        began = time.perf_counter()
        tokens = sum(engine.step(Progress(step=step))[0].tokens for step in range(3))
        rate = tokens / (time.perf_counter() - began)
    found.figures["deterministic_tokens_per_s"] = round(rate, 1)


@check(9, needs_cuda=True, by_name=True)
def lora_512(ground: Ground, found: Findings) -> None:
    """7B, LoRA, 512 tokens a step."""
    _train(ground, found, "lora", 512)


@check(9, needs_cuda=True, by_name=True)
def normbias_4096(ground: Ground, found: Findings) -> None:
    """7B, NormBias, 4,096 tokens a step."""
    _train(ground, found, "normbias", 4096)


@check(9, needs_cuda=True, by_name=True)
def normbias_512(ground: Ground, found: Findings) -> None:
    """7B, NormBias, 512 tokens a step."""
    _train(ground, found, "normbias", 512)


@check(9, needs_cuda=True)
def qst_4096(ground: Ground, found: Findings) -> None:
    """7B, side tuning as a run has it by default, 4,096 tokens a step."""
    _train(ground, found, "qst", 4096)


@check(9, needs_cuda=True, by_name=True)
def qst_512(ground: Ground, found: Findings) -> None:
    """7B, side tuning, 512 tokens a step."""
    _train(ground, found, "qst", 512)


@check(10, needs_cuda=True, by_name=True)
def recomputed_4096(ground: Ground, found: Findings) -> None:
    """7B, LoRA, 4,096 tokens a step, all layers recomputed."""
    _train(ground, found, "lora", 4096, checkpointing="all")


@check(8, needs_cuda=True, by_name=True)
def decoding_1(ground: Ground, found: Findings) -> None:
    """7B in NF4, one prompt of 128 tokens and 128 new ones."""
    _decode(ground, found, 1)


@check(8, needs_cuda=True)
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


@check(25, needs_cuda=True, by_name=True)
def normbias_70b_512(ground: Ground, found: Findings) -> None:
    """70B, NormBias, 512 tokens a step, all layers recomputed: its peak shall stay below 40 GB."""
    _train(ground, found, "normbias", 512, "70B", checkpointing="all")
    if ground.cuda and not ground.tiny:
        found.expect(found.figures["peak_gb"] < MOST_70B / 1e9, f"the peak is {found.figures['peak_gb']} GB")


@check(25, needs_cuda=True, by_name=True)
def normbias_70b_512_kept(ground: Ground, found: Findings) -> None:
    """The same without recomputation, which is faster."""
    _train(ground, found, "normbias", 512, "70B")


CHECKS = [
    lora_4096, normbias_4096, qst_4096, decoding_1, decoding_8, lora_512, normbias_512, qst_512, recomputed_4096,
    peer_lora_4096, peer_decoding, normbias_70b_512, normbias_70b_512_kept,
]  # fmt: skip
