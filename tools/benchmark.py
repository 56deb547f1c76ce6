"""Measure training, decoding and loading:

    python tools/benchmark.py train --model DIR --data FILE --steps 10 --method lora --quant
    python tools/benchmark.py train --model 7B --tokens 4096 --seq 512 --quant    (random weights and documents)
    python tools/benchmark.py generate --model DIR --quant --peer     (--peer: transformers + bitsandbytes too)
    python tools/benchmark.py load --model DIR --quant                (and once more with --peer)

Documents are taken in the file's order, so that another system can be given the same ones.
"""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from accessory.blueprint import DTYPES
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.training_state import Progress
from accessory.engine import Engine
from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError, nearest
from accessory.memory.row_file import ROWS
from accessory.optim import OPTIMIZERS
from accessory.parallel import groups
from accessory.parallel.groups import Layout
from accessory.run.report import StepReport
from tools.benchmarking import ideal, time_shares
from tools.benchmarking.decoding import Decoding
from tools.benchmarking.loading import Watch, load_ours, load_peer
from tools.benchmarking.training import METHODS, WITH_LORA, Training
from tools.model_sizes import SIZES, is_shape

UNTIMED_STEPS = 2


def train(
    model: str,
    data: str | None = None,
    steps: int = 10,
    batch_size: int | None = None,
    tokens: int | None = None,
    seq: int | tuple[int, ...] | None = None,
    supervised: float | None = None,
    max_words: int = 512,
    method: str = "lora",
    rank: int | None = None,
    adapter: str | None = None,
    quant: bool = False,
    quant_type: str = "nf4",
    lr: float = 2e-4,
    optim: str = "adamw",
    checkpointing: bool | int | str = "none",
    share_prefixes: bool = True,
    cache_base: str | None = None,
    cache_base_rows: str = "exact",
    precision: str = "bf16",
    device: str = "auto",
    json: bool = False,
) -> None:
    """Train and print tokens/s, peak memory, losses, what the time goes to and how far that is from the ideal.

    The first two steps are not timed. After the last it is run once more, to be profiled.

    Args:
        model: a checkpoint; or 7B, 13B, 70B, 1.1B, 135M, tiny or a settings file: random weights, made on the device.
        data: what to train on, STEPS x BATCH_SIZE records of it; absent, random documents.
        steps: optimizer steps, of one micro-batch.
        batch_size: documents a step; 8, if TOKENS is absent too.
        tokens: of a step on random documents, instead of BATCH_SIZE.
        seq: tokens of a random document, 512; or several numbers that take turns: 64,448.
        supervised: the share of a random document that is learned; all, if absent.
        max_words: the longest document of DATA in tokens.
        method: one of METHODS.
        rank: of LoRA; 16, or the adapter's.
        adapter: a PEFT adapter or a trained part, whose values the trained parameters start with.
        quant: keep the base in 4 bits.
        quant_type: a format, as --quant_type of training.
        lr: learning rate, constant.
        optim: adamw, adamw8bit or paged_adamw.
        checkpointing: layers to recompute: none, a number, or all (also without a value).
        share_prefixes: whether what documents begin alike with is computed once, as the fine-tuning run does; not with
            dropout.
        cache_base: a new directory for what the base gives, from which the same steps are then taken once more.
        cache_base_rows: exact or int8, as of training.
        precision: bf16, fp16, fp32 or tf32.
        device: auto, cpu or cuda.
        json: print one JSON line.
    """
    _check_model(str(model))
    _check_named("--method", method, METHODS)
    _check_named("--optim", optim, OPTIMIZERS)
    _check_named("--precision", precision, DTYPES)
    _check_counts(steps=steps, batch_size=batch_size, tokens=tokens, max_words=max_words, rank=rank)
    _check_random(data, tokens=tokens, seq=seq, supervised=supervised)
    lengths = seq if isinstance(seq, tuple) else (512 if seq is None else seq,)
    for length in lengths:
        _check_counts(seq=length)
    if steps <= UNTIMED_STEPS:
        raise ConfigError(f"--steps {steps}: the first {UNTIMED_STEPS} are not timed, so more are needed.")
    for flag, share in (("--supervised", supervised), ("--lr", lr)):
        if share is not None and (not isinstance(share, (int, float)) or not 0 < share <= 1):
            raise ConfigError(f"{flag} {share!r}: expected a number above 0, of at most 1.")
    _check_method(method, rank, adapter, quant_type if quant else None)
    _check_cache(method, cache_base, cache_base_rows)
    training = Training(
        model=str(model), data=None if data is None else str(data), steps=steps,
        batch_size=_documents(batch_size, tokens, lengths), seq=lengths,
        supervised=1.0 if supervised is None else supervised, max_words=max_words, method=method, rank=rank,
        adapter=None if adapter is None else str(adapter), quant_type=quant_type if quant else None,
        precision=precision, lr=lr, optim=optim, checkpointing=_layers(checkpointing), share_prefixes=share_prefixes,
        cache_base=None if cache_base is None else str(cache_base), cache_base_rows=cache_base_rows,
    )  # fmt: skip
    layout = groups.start(device)
    engine = training.engine(layout)
    if steps > engine.schedule.steps_per_epoch:
        raise ConfigError(
            f"--steps {steps}: {data} is enough for {engine.schedule.steps_per_epoch} steps of {training.batch_size}."
        )
    result = _measure_training(engine, steps, layout)
    if layout.is_main:
        _show({"system": "accessory", "method": method, "device": layout.device.type, "steps": steps, **result}, json)
    groups.stop()


train.__doc__ = train.__doc__.replace("METHODS", ", ".join(METHODS))


def _measure_training(engine: Engine, steps: int, layout: Layout) -> dict:
    reports = run_steps(engine, steps)
    result = figures_of(engine, reports)
    shares = time_shares.measure(lambda: engine.step(Progress(step=steps - 1)), engine)
    result["shares"] = {category: round(share, 2) for category, share in shares.items()}
    if engine.base_cache:
        result |= _measure_cached(engine, steps)
    return result | beside_ideal(engine, layout, reports)


def run_steps(engine: Engine, steps: int, first: int = 0) -> list[StepReport]:
    """Take `steps` steps, from number `first` of the order on."""
    engine.model.train()
    progress = Progress(step=first, total_steps=first)
    return [engine.step(progress)[0] for _ in range(steps)]


def figures_of(engine: Engine, reports: list[StepReport]) -> dict:
    """What `train` prints first, of steps from the first on."""
    timed = reports[UNTIMED_STEPS:]
    seconds, tokens = sum(r.seconds for r in timed), sum(r.tokens for r in timed)
    return {
        "tokens": tokens,
        "computed_tokens": sum(_packed_tokens(engine, timed)),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_bytes": reports[-1].peak_bytes,
        "trainable": sum(p.numel() for p in engine.parameters.values()),
        "losses": [round(r.loss, 4) for r in reports],
    }


def _packed_tokens(engine: Engine, reports: list[StepReport]) -> list[int]:
    return [engine.order.packed_tokens(0, report.step - 1) for report in reports]


def _measure_cached(engine: Engine, steps: int) -> dict:
    """The same steps again, in a second epoch, without the base."""
    engine.base_cache.settle()
    progress = Progress(epoch=1)
    timed = [engine.step(progress)[0] for _ in range(steps)][UNTIMED_STEPS:]
    tokens, seconds = sum(r.tokens for r in timed), sum(r.seconds for r in timed)
    return {"cached_tokens_per_s": round(tokens / seconds, 1), "cached_bytes": engine.base_cache.file.total_bytes}


def beside_ideal(engine: Engine, layout: Layout, reports: list[StepReport]) -> dict:
    """What `train` prints last: steps from the first on, beside what the device could do at best."""
    decoder, order, timed = engine.model.llma, engine.order, reports[UNTIMED_STEPS:]
    packed, work = _packed_tokens(engine, timed), ideal.Work()
    for report, computed in zip(timed, packed, strict=True):
        lengths = order.corpus.lengths[order.global_ids(0, report.step - 1)].tolist()
        work += ideal.step_work(decoder, lengths, computed, report.supervised, layout.dp_size)
    per_rank = max(sum(packed) // len(timed) // layout.dp_size, 1)
    rate, bandwidth = ideal.product_rate(decoder, per_rank, layout.device), ideal.copy_bandwidth(layout.device)
    seconds, tokens = sum(r.seconds for r in timed), sum(r.tokens for r in timed)
    return ideal.compare(work, tokens, seconds, rate, bandwidth, layout.world_size)


def _check_random(data: str | None, **flags: object) -> None:
    """Raise `ConfigError` for a flag of random documents beside `data`."""
    for name, value in flags.items():
        if data is not None and value is not None:
            raise ConfigError(f"--{name} {value}: is of random documents; leave it out, or --data {data}.")


def _documents(batch_size: int | None, tokens: int | None, lengths: tuple[int, ...]) -> int:
    """Documents of a step, with `tokens` in all if that is given."""
    if tokens is None:
        return 8 if batch_size is None else batch_size
    if batch_size is not None:
        raise ConfigError(f"--tokens {tokens} and --batch_size {batch_size} both say how large a step is: give one.")
    if tokens % sum(lengths):
        raise ConfigError(f"--tokens {tokens}: is no multiple of --seq {sum(lengths)}, the length of a document.")
    return tokens // sum(lengths) * len(lengths)


def _layers(asked: bool | int | str) -> int | str:
    """The value of `--checkpointing`: none, all or a number."""
    if isinstance(asked, bool):
        return "all" if asked else "none"
    if asked in ("none", "all") or (isinstance(asked, int) and asked >= 0):
        return asked
    known = ("none", "all")
    raise ConfigError(f"--checkpointing {asked!r}: expected none, all or a number.{nearest(str(asked), known)}")


def _check_model(model: str) -> None:
    if model not in SIZES and not Path(model).exists():
        raise ConfigError(
            f"--model {model!r} is neither a file or directory nor one of {', '.join(SIZES)}.{nearest(model, SIZES)}"
        )


def _check_cache(method: str, cache_base: str | None, rows: str) -> None:
    _check_named("--cache_base_rows", rows, ROWS)
    if cache_base is None:
        return
    if not METHODS[method].keeps_base:
        known = ", ".join(name for name, known in METHODS.items() if known.keeps_base)
        raise ConfigError(f"--cache_base {cache_base}: --method {method} goes back through the base; expected {known}.")
    if Path(cache_base).exists():
        raise ConfigError(f"--cache_base {cache_base}: is there already; give a new directory.")


def _check_method(method: str, rank: int | None, adapter: str | None, quant_type: str | None) -> None:
    if quant_type and (fault := METHODS[method].storage_fault(quant_type)):
        raise ConfigError(f"--quant with --method {method}: {fault}; leave one of them out.")
    if method not in WITH_LORA and (rank is not None or adapter is not None):
        flag = f"--rank {rank}" if adapter is None else f"--adapter {adapter}"
        raise ConfigError(f"{flag}: --method {method} has no LoRA; expected {' or '.join(WITH_LORA)}.")


def _check_named(flag: str, value: str, known) -> None:
    if value not in known:
        raise ConfigError(f"{flag} {value!r} is not one of {', '.join(known)}.{nearest(str(value), known)}")


def _check_counts(**flags: int | None) -> None:
    for name, value in flags.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"--{name} {value!r}: expected a number of 1 or more.")


def generate(
    model: str,
    data: str | None = None,
    batch_size: int = 1,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    quant: bool = False,
    quant_type: str = "nf4",
    precision: str = "bf16",
    peer: bool = False,
    device: str = "auto",
    json: bool = False,
) -> None:
    """Decode greedily and print tokens/s, milliseconds a token, and how far that is from reading the weights only.

    Args:
        model: a checkpoint; without `peer` also 7B, 13B, 70B, 1.1B, 135M, tiny or a settings file: random weights.
        data: whose first BATCH_SIZE documents of PROMPT_TOKENS or more the prompts are cut from; absent, random ones.
        batch_size: prompts that are decoded at once.
        prompt_tokens: of each.
        new_tokens: of each answer, whatever would end it.
        quant: keep the matrices in 4 bits.
        quant_type: a format, as --quant_type of training.
        precision: bf16, fp16 or fp32.
        peer: have transformers and bitsandbytes decode the same prompts then, and count the tokens that are equal.
        device: auto, cpu or cuda.
        json: print one JSON line, the tokens too.
    """
    model = str(model)
    _check_model(model)
    _check_counts(batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    if new_tokens < 2:
        raise ConfigError(f"--new_tokens {new_tokens}: the first is the prompt's to wait for, so more are needed.")
    if peer and is_shape(model):
        raise ConfigError(f"--peer: --model {model} has no weights in a file; give a Hugging Face directory.")
    _check_named("--precision", precision, DTYPES)
    layout = groups.start(device)
    decoding = Decoding(
        model=model, data=None if data is None else str(data), batch_size=batch_size,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, quant_type=quant_type if quant else None,
        precision=precision,
    )  # fmt: skip
    ours = decoding.by_us(layout)
    bandwidth = ideal.copy_bandwidth(layout.device)
    fastest = 1000 * ours.read_bytes / bandwidth
    result = {
        "system": "accessory",
        "device": layout.device.type,
        "quant": decoding.quant_type,
        "batch_size": batch_size,
        **ours.figures(),
        "read_bytes_per_step": ours.read_bytes,
        "copy_bytes_per_s": round(bandwidth),
        "ideal_ms_per_token": round(fastest, 3),
        "ratio_to_ideal": round(fastest / ours.ms_per_token, 4),
    }
    if peer:
        theirs = decoding.by_peer(ours.prompts, layout)
        result |= {f"peer_{name}": value for name, value in theirs.figures().items()}
        result |= {"equal_tokens": ours.equal_tokens(theirs), "of_tokens": batch_size * new_tokens}
    if layout.is_main:
        _show(result | {"answers": ours.answers}, json)
    groups.stop()


def load(model: str, quant: bool = False, quant_type: str = "nf4", peer: bool = False, json: bool = False) -> None:
    """Time how long MODEL takes to load, and how much memory loading takes at most beyond the loaded model.

    The process's own memory counts, pages of mapped files do not. With `peer` transformers and bitsandbytes load the
    same directory.
    """
    with Watch() as watch:
        loaded = (load_peer if peer else load_ours)(model, quant, quant_type)
    held = {p.data_ptr(): p.nbytes for p in loaded.parameters()}
    matrices = [t for t in open_source(model).tensors.values() if len(t.shape) == 2]
    result = {
        "model": str(model),
        "quant": quant_type if quant else None,
        "loaded_by": "transformers" if peer else "accessory",
        "seconds": round(watch.seconds, 2),
        "model_bytes": sum(held.values()),
        "peak_bytes_above_model": watch.peak - sum(held.values()),
        "largest_matrix_bytes_in_16_bits": 2 * max(t.shape[0] * t.shape[1] for t in matrices),
    }
    _show(result, json)


def _show(result: dict, as_json: bool) -> None:
    if as_json:
        print(dumps(result))
        return
    shares = result.pop("shares", {})
    result.pop("answers", None)
    for name, value in result.items():
        print(f"{name:>24}  {value}")
    for category, share in shares.items():
        print(f"{'time in ' + category:>24}  {share:.2f} %")


COMMANDS = {"train": train, "generate": generate, "load": load}


def _command() -> None:
    """Run the command that the first word names, with the flags that follow."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    _check_named("command", name, COMMANDS)
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    from_command_line(COMMANDS[name])()


if __name__ == "__main__":
    run_tool(_command)
