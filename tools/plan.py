"""Will it fit, and if not, what would help?  From the model's shapes alone, by the code that --dry_run prints:

python tools/plan.py 7B --method lora --seq 2048 --device_memory 8      python tools/plan.py table --seq 512
python tools/plan.py compare 70B --methods qst,lora --batch_size 16 --seq 384
python tools/plan.py images 13B --seq 512
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import accumulate, chain
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from accessory.blueprint import DTYPES, attach_vision, keep_packed, packed_linears, plain_linears
from accessory.checkpoint.opening import open_source
from accessory.checkpoint.source import Source
from accessory.checkpoint.strategy import storages_of_mix, strategy_of
from accessory.checkpoint.vision_part import UNNAMED
from accessory.entry import from_command_line, run_tool
from accessory.errors import ConfigError, check_known, nearest
from accessory.memory.plan import OCCASIONAL, MemoryPlan, StepMemory, device_memory, parameter_counts
from accessory.memory.recompute import MARGIN
from accessory.memory.teacher import TeacherMemory
from accessory.memory.vision import VisionMemory
from accessory.method import Attachment, Method, presets
from accessory.model.decoder import Decoder
from accessory.optim import OPTIMIZERS
from accessory.parallel.groups import Layout
from accessory.quant import MIXES, QUANT_TYPES, STORAGES, PackedWeight, storage
from accessory.quant.mixes import WIDE
from accessory.vision import VISIONS, Vision
from tools.model_sizes import LLAMA_2, args_of

METHODS = presets()
PLAIN = "none"
"""The --quant_type that packs nothing."""


@dataclass(frozen=True)
class Setting:
    """All that determines a step's memory, by the names of the flags."""

    method: str = "normbias"
    quant_type: str = "nf4"
    precision: str = "bf16"
    seq: int = 512
    batch_size: int = 1
    accum_iter: int = 1
    max_tokens: int | None = None
    checkpointing: int = 0
    optim: str = "adamw"
    offload_inputs: bool = False
    model_parallel_size: int = 1
    data_parallel_size: int = 1
    data_parallel: str = "sdp"
    teacher: str | None = None
    teacher_quant_type: str = PLAIN
    vision: str | None = None

    def check(self, model: str) -> None:
        """Raise `ConfigError` for names we do not know, numbers below 1, and what cannot be together."""
        names = {
            "method": METHODS,
            "precision": DTYPES,
            "optim": OPTIMIZERS,
            "data_parallel": ("sdp", "fsdp"),
            "teacher_quant_type": (PLAIN, *STORAGES),
            "vision": (None, *VISIONS),
        }
        for flag, known in names.items():
            check_known(f"--{flag}", getattr(self, flag), known)
        for flag in ("seq", "batch_size", "accum_iter", "model_parallel_size", "data_parallel_size"):
            value = getattr(self, flag)
            if type(value) is not int or value < 1:
                raise ConfigError(f"--{flag} {value!r}: expected a whole number from 1 on.")
        if self.teacher_quant_type != PLAIN and not self.teacher:
            raise ConfigError("--teacher_quant_type without --teacher changes nothing: give both, or neither.")
        if self.max_tokens is not None and (type(self.max_tokens) is not int or self.max_tokens < self.seq):
            raise ConfigError(
                f"--max_tokens {self.max_tokens!r}: expected a whole number from {self.seq} (--seq) on, so that each "
                "document has room."
            )
        if self.vision and (unseeing := METHODS[self.method].vision_fault):
            raise ConfigError(f"--vision {self.vision} with --method {self.method}: {unseeing}; leave --vision out.")
        if self.vision and self.vision != UNNAMED and METHODS[self.method].sees_by_clip:
            raise ConfigError(f"--vision {self.vision} with --method {self.method}, which sees by {UNNAMED} alone.")
        fault = None if self.quant_type == PLAIN else METHODS[self.method].storage_fault(self.quant_type)
        if not fault:
            return
        if packed := packed_base(model):
            raise ConfigError(f"--method {self.method}: {packed.path} is packed, and {fault}; give another --method.")
        raise ConfigError(
            f"--method {self.method} with --quant_type {self.quant_type}: {fault}; give --quant_type "
            f"{default_storage(self.method)} or another --method."
        )

    @property
    def tokens(self) -> int:
        """Tokens of the largest micro-batch there can be, as `GlobalOrder.most_tokens`."""
        if self.max_tokens is None:
            return self.seq * self.batch_size
        return min(self.seq * self.batch_size * self.accum_iter * self.data_parallel_size, self.max_tokens)

    @property
    def pictures(self) -> int:
        """The most that a micro-batch can have, one of each document."""
        return min(self.tokens // self.seq, self.tokens // max(published(self.vision, self.method).place.rows, 1))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each rank; with more than one, gradients are accumulated."""
        return -(-self.seq * self.batch_size * self.accum_iter // self.tokens)

    def flags_beside(self, other: Setting) -> str:
        """The flags, with values, in which this differs from `other`."""
        changed = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        values = {name: getattr(self, name) for name in changed}
        return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in values.items())


@cache
def base_in(model: str) -> Source | None:
    """The checkpoint in the directory `model`; None: it is no directory, or holds settings alone.

    Raises `CheckpointError` for one that cannot be read.
    """
    path = Path(model)
    holds_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    return open_source(path) if path.is_dir() and holds_weights else None


def packed_base(model: str) -> Source | None:
    """The same where its matrices lie packed, which training takes as they are."""
    base = base_in(model)
    return base if base and base.storage else None


def stored(model: str, quant_type: str | None) -> str | None:
    """How the linears are packed, of a base that is packed already or as asked; None: neither says.

    Raises `ConfigError` for an unknown format, and where a packed base is to be plain.
    """
    if quant_type is not None:
        check_known("--quant_type", quant_type, (PLAIN, *QUANT_TYPES))
    packed = packed_base(model)
    if packed and quant_type == PLAIN:
        raise ConfigError(
            f"--quant_type {PLAIN}: {packed.path} is packed as {packed.storage_names}, and its full weights are gone. "
            "Leave --quant_type out."
        )
    return quant_type or (packed.storage if packed else None)


def default_storage(method: str) -> str:
    """The --quant_type of a plan that states none: the first that a known method can be trained on."""
    fault_of = METHODS[method].storage_fault
    return next((kind for kind in ("nf4", "int2_g64") if fault_of(kind) is None), PLAIN)


def plan(
    model: str,
    method: str = "normbias",
    quant_type: str | None = None,
    precision: str = "bf16",
    seq: int = 512,
    batch_size: int = 1,
    accum_iter: int = 1,
    max_tokens: int | None = None,
    checkpointing: int | str | bool = "none",
    optim: str = "adamw",
    offload_inputs: bool = False,
    model_parallel_size: int = 1,
    data_parallel_size: int = 1,
    data_parallel: str = "sdp",
    teacher: str | None = None,
    teacher_quant_type: str = PLAIN,
    vision: str | None = None,
    device: str = "auto",
    device_memory: float | None = None,
) -> None:
    """Print the memory plan of MODEL in training, per rank, whether it fits, and if not, with which flags it would.

    Args:
        model: 7B, 13B, 70B, a params.json or config.json, or a directory with one (Hugging Face, Meta or ours).
        method: one of METHODS, LoRA being of rank 16.
        quant_type: a format, as --quant_type of training, or none; absent: as MODEL is packed, of a plain one nf4,
            int2_g64 with qsft, none with full.
        precision: bf16, fp16, fp32 or tf32.
        seq: tokens of a document.
        batch_size: documents of a micro-batch.
        accum_iter: micro-batches of a step.
        max_tokens: deal a step's documents into micro-batches of at most that many tokens.
        checkpointing: none, a number of layers, or all.
        optim: adamw, adamw8bit or paged_adamw.
        offload_inputs: keep the inputs of recomputed layers in host memory (CUDA).
        model_parallel_size: ranks that share one copy of the model.
        data_parallel_size: copies of the model.
        data_parallel: sdp or fsdp.
        teacher: a model that teaches, given as MODEL is.
        teacher_quant_type: a format to pack the teacher in, or none.
        vision: an image encoder of published size, an image in each document: VISIONS.
        device: cpu, cuda, or auto: CUDA where there is any.
        device_memory: GB (1e9 bytes) a rank has; absent: what the device here has.
    """
    model = str(model)
    check_known("--method", method, METHODS)
    quant_type = stored(model, quant_type) or default_storage(method)
    setting = Setting(
        method, quant_type, precision, seq, batch_size, accum_iter, max_tokens, 0,
        optim, offload_inputs, model_parallel_size, data_parallel_size, data_parallel,
        None if teacher is None else str(teacher), teacher_quant_type, vision,
    )  # fmt: skip
    setting.check(model)
    setting = replace(setting, checkpointing=_layers(checkpointing, _n_layers(model, setting)))
    place = _device(device)
    if offload_inputs and place.type != "cuda":
        raise ConfigError(
            f"--offload_inputs on --device {place.type}: inputs are in host memory already; leave it out."
        )
    made, trained, total = planned(model, setting, place)
    room = _room(device_memory, place)
    print(f"trainable parameters: {trained:,} of {total:,}")
    print(made.table(f"{model} {method}, {batch_size} x {seq} tokens", room))
    if room is not None:
        print(_verdict(model, setting, place, made, room))


plan.__doc__ = plan.__doc__.replace("METHODS", ", ".join(METHODS)).replace("VISIONS", ", ".join(VISIONS))


def table(seq: int = 512) -> None:
    """Print the Markdown table of docs/memory.md: LLaMA-2 in NF4 at one document of SEQ tokens."""
    _print_rows("model | ", [(size, Setting(method, seq=seq), checkpointing)
                             for size in LLAMA_2 for method in ("normbias", "normbiaslora")
                             for checkpointing in (True, False)])  # fmt: skip


def compare(model: str, methods: str = "lora,qst", seq: int = 512, batch_size: int = 1) -> None:
    """Print a Markdown table of a GPU's memory in training MODEL, with and without --checkpointing.

    Args:
        model: as for the plan of one method; in NF4, or as it is packed.
        methods: names of methods, with commas between them.
        seq: tokens of a document.
        batch_size: documents of a micro-batch.
    """
    names = methods if isinstance(methods, list | tuple) else str(methods).split(",")
    model = str(model)
    kind = stored(model, None) or "nf4"
    settings = [Setting(str(name), kind, seq=seq, batch_size=batch_size) for name in names]
    for setting in settings:
        setting.check(model)
    _print_rows("", [(model, setting, again) for setting in settings for again in (True, False)])


def images(model: str = "13B", vision: str = "qformerv2", seq: int = 512) -> None:
    """Print the Markdown table of docs/memory.md on images: one document with one, asked, and in training.

    Args:
        model: as for the plan; in NF4, or as it is packed.
        vision: an image encoder of published size.
        seq: tokens of the document, with the image's rows.
    """
    setting = Setting("normbiaslora", stored(str(model), None) or "nf4", seq=seq, vision=vision)
    setting.check(str(model))
    names = [field.name for field in fields(MemoryPlan) if field.name != "teacher"] + ["total"]
    print(f"| | {' | '.join(names)} |\n{'|---' * (len(names) + 1)}|")
    made = {
        "asked": asked(str(model), setting),
        "normbiaslora, `--checkpointing`": _trained(str(model), setting, again=True),
        "normbiaslora": _trained(str(model), setting, again=False),
    }
    for name, found in made.items():
        print(f"| {name} | {' | '.join(f'{getattr(found, part) / 1e9:.3f}' for part in names)} |")


def asked(model: str, setting: Setting) -> MemoryPlan:
    """A GPU's memory in asking a model about a document of that length, and an image if it sees some."""
    device = torch.device("cuda")
    decoder, attachment = built(model, setting)
    alone, lengths = Layout(device=device), (setting.seq,)
    memory = TeacherMemory(decoder, alone, lengths, "sdp", frozenset())
    vision = published(setting.vision, setting.method) if setting.vision else None
    seen = VisionMemory(decoder, vision, Attachment(), alone, 1) if vision else None
    trained = sum(p.nbytes for name, p in decoder.named_parameters() if name in attachment.trainable)
    cached = sum(part.nbytes for cache in decoder.new_cache(1, setting.seq) for part in (cache.keys, cache.values))
    logits = decoder.args.vocab_size * (4 + decoder.dtype.itemsize)
    encoder, working = (seen.weights, seen.working) if seen else (0, 0)
    buffers = [max(each) for each in zip(*((m.workspace, m.buffer) for m in (memory, seen) if m), strict=True)]
    return MemoryPlan(
        weights=memory.weights - encoder - trained, trainable=trained, gradients=0, optimizer=0, activations=cached,
        logits=logits, buffers=sum(buffers), working=cached + max(working, memory.forward, logits), encoder=encoder,
        images=working,
    )  # fmt: skip


def _trained(model: str, setting: Setting, again: bool) -> MemoryPlan:
    layers = _n_layers(model, setting) if again else 0
    return planned(model, replace(setting, checkpointing=layers), torch.device("cuda"))[0]


def _print_rows(first: str, rows: list[tuple[str, Setting, bool]]) -> None:
    """Print a table of (model, setting, whether all layers are recomputed); `first`: heads of columns of its own."""
    names = [field.name for field in fields(MemoryPlan) if field.name not in OCCASIONAL] + ["total"]
    heads = f"{first}method | trainable parameters | {' | '.join(names)}"
    print(f"| {heads} |\n{'|---' * (heads.count('|') + 1)}|")
    for model, setting, again in rows:
        layers = _n_layers(model, setting) if again else 0
        made, trained, _ = planned(model, replace(setting, checkpointing=layers), torch.device("cuda"))
        cells = [f"{getattr(made, name) / 1e9:.3f}" for name in names]
        label = f"{setting.method}, `--checkpointing`" if again else setting.method
        print(f"| {f'{model} | ' if first else ''}{label} | {trained:,} | {' | '.join(cells)} |")


def planned(model: str, setting: Setting, device: torch.device) -> tuple[MemoryPlan, int, int]:
    """The plan of a rank, and the trainable and all parameters of the whole model."""
    ranks, replicas = setting.model_parallel_size, setting.data_parallel_size
    decoder, attachment = built(model, setting)
    step = StepMemory(
        decoder,
        attachment,
        Layout(world_size=ranks * replicas, mp_size=ranks, dp_size=replicas, device=device),
        tokens=setting.tokens,
        longest=setting.seq,
        micro_batches=setting.micro_batches,
        data_parallel=setting.data_parallel,
        optim=setting.optim,
        offload=setting.offload_inputs,
        teacher=(_teaching(setting, decoder), frozenset()) if setting.teacher else None,
        seen=(published(setting.vision, setting.method), setting.pictures) if setting.vision else None,
    )
    return step.plan(setting.checkpointing), *parameter_counts(decoder, attachment)


def _n_layers(model: str, setting: Setting) -> int:
    """Layers that can be recomputed: a method may have some of its own."""
    decoder, _ = built(model, setting)
    return sum(1 for _ in decoder.blocks())


def published(vision: str, method: str) -> Vision:
    """The image encoder of that name in its published size, as `method` has it."""
    return METHODS[method].sees(VISIONS[vision](VISIONS[vision].Settings()))


def built(model: str, setting: Setting) -> tuple[Decoder, Attachment]:
    """The decoder on meta, with the method attached, and what sees images."""
    ranks = setting.model_parallel_size
    return _built(model, setting.method, setting.quant_type, setting.precision, ranks, setting.vision)


@cache
def _built(
    model: str, method: str, quant_type: str, precision: str, ranks: int, vision: str | None
) -> tuple[Decoder, Attachment]:
    args = args_of(model)
    made = METHODS[method]
    made.check(args, Layout(world_size=ranks, mp_size=ranks), "sdp")
    maker, dtype = None if quant_type == PLAIN else made.storage_of(storage(quant_type)), DTYPES[precision]
    decoder = made.decoder(args, dtype=dtype, ranks=ranks, storage=maker)
    base = base_in(model)
    if base and base.storage:
        _keep(decoder, made, packed_linears([base], quant_type), maker)
        for name in plain_linears([base]):
            decoder.get_submodule(name).keep_plain(dtype)
    elif base and quant_type in MIXES and strategy_of(base.path):
        _keep(decoder, made, storages_of_mix([base], quant_type), maker)
    elif quant_type in MIXES:
        _widen(decoder, MIXES[quant_type], made.storage_of(WIDE))
    attachment = made.attach(decoder)
    if vision:
        seen = published(vision, method)
        attach_vision(seen, decoder, attachment, made, None if quant_type == PLAIN else quant_type)
    made.prepare_training(decoder, attachment)
    return decoder, attachment


def _keep(decoder: Decoder, method: Method, packed: Mapping[str, type[PackedWeight]], default) -> None:
    """Have each linear packed as `packed` says, in the form in which the method trains it."""
    keep_packed(decoder, {name: method.storage_of(kind) for name, kind in packed.items()}, default)


def _teaching(setting: Setting, student: Decoder) -> Decoder:
    """The teacher, with as many rows as the student has, as a run lays it out."""
    args = args_of(setting.teacher).model_copy(update={"vocab_size": student.args.vocab_size})
    kind = None if setting.teacher_quant_type == PLAIN else storage(setting.teacher_quant_type)
    args.check_model_parallel(student.ranks)
    return Decoder(args, dtype=student.dtype, ranks=student.ranks, storage=kind)


def _widen(decoder: Decoder, share: float, wide: type[PackedWeight]) -> None:
    """Store as `wide` that share of the blocks' weights. Which ones a strategy says; here some of every block."""
    blocks = [
        [*chain(*block.attention.linears_by_input(), *block.feed_forward.linears_by_input())]
        for block in decoder.layers
    ]
    room = share * sum(linear.weight.shape.numel() for linear in chain(*blocks))
    for linear in chain(*zip(*blocks, strict=True)):
        if linear.weight.shape.numel() <= room:
            room -= linear.weight.shape.numel()
            linear.keep_packed(wide)


def _verdict(model: str, setting: Setting, device: torch.device, made: MemoryPlan, room: int) -> str:
    """Whether the plan fits, and the flags with which it would: each that is enough alone, else the fewest together."""
    usable = room * (1 - MARGIN)  # as --checkpointing auto spares it
    spared = f"{room / 1e9:.1f} GB, {MARGIN:.0%} of them spared for workspaces and fragmentation"
    if made.total <= usable:
        return f"It fits into {spared}."

    def total(changed: Setting) -> int:
        """Bytes that the changed setting takes on a device."""
        return planned(model, changed, device)[0].total

    def fits(changed: Setting) -> bool:
        """Whether the changed setting fits into the device."""
        return total(changed) <= usable

    failed = f"It does not fit into {spared}."
    steps = list(_steps(model, setting, device))
    enough = [next((s for s in step if fits(replace(setting, **s))), None) for step in steps]
    if any(enough):
        found = [replace(setting, **changes).flags_beside(setting) for changes in enough if changes]
        return "\n  ".join([f"{failed} Any of these is enough:", *found])
    together = list(accumulate((step[-1] for step in steps), lambda one, other: one | other))
    changes = next((changes for changes in together if fits(replace(setting, **changes))), None)
    if changes is None:
        least = replace(setting, **together[-1]) if together else setting
        flags = least.flags_beside(setting) or "what is set"
        return f"{failed} No flag of this tool is enough: with {flags} a rank takes {total(least) / 1e9:.3f} GB."
    for flag in reversed(list(changes)):  # those that cost most first
        fewer = {name: value for name, value in changes.items() if name != flag}
        if fits(replace(setting, **fewer)):
            changes = fewer
    return f"{failed} These are enough together:\n  {replace(setting, **changes).flags_beside(setting)}"


def _steps(model: str, setting: Setting, device: torch.device) -> Iterator[list[dict[str, object]]]:
    """Changes that make a step smaller, by what they cost the user; of each kind the slightest first."""
    args, n_layers = args_of(model), _n_layers(model, setting)
    if setting.checkpointing < n_layers:
        yield [{"checkpointing": layers} for layers in range(setting.checkpointing + 1, n_layers + 1)]
    if sizes := _halved(setting.tokens, setting.seq):
        yield [{"max_tokens": size} for size in sizes]
    if setting.optim != "adamw8bit":
        yield [{"optim": "adamw8bit"}]
    if setting.quant_type != "nf4" and not packed_base(model) and not METHODS[setting.method].storage_fault("nf4"):
        yield [{"quant_type": "nf4"}]
    if setting.batch_size > 1:
        yield [{"batch_size": size} for size in _halved(setting.batch_size, 1)]
    if METHODS[setting.method].trains_base:
        yield [{"method": "lora", "quant_type": "nf4"}]
    elif setting.method != "normbias":
        yield [{"method": "normbias"}]
    if device.type == "cuda" and not setting.offload_inputs:
        yield [{"checkpointing": n_layers, "offload_inputs": True}]
    if setting.seq > 256:
        yield [{"seq": seq} for seq in _halved(setting.seq, 128)]
    counts = args.n_heads, args.n_kv_heads, args.hidden_dim // 2
    ranks = [n for n in (2, 4, 8) if n > setting.model_parallel_size and not any(count % n for count in counts)]
    if ranks:
        yield [{"model_parallel_size": n} for n in ranks]
    if setting.data_parallel_size < 8:
        sizes = [n for n in (2, 4, 8) if n > setting.data_parallel_size]
        yield [{"data_parallel_size": n, "data_parallel": "fsdp"} for n in sizes]


def _halved(number: int, least: int) -> list[int]:
    found = []
    while number // 2 >= least:
        number //= 2
        found.append(number)
    return found


def _layers(asked: int | str | bool, n_layers: int) -> int:
    """Layers to recompute; the flag without a value is `all`, as in training."""
    number = n_layers if asked == "all" or asked is True else 0 if asked == "none" or asked is False else asked
    if type(number) is not int or not 0 <= number <= n_layers:
        raise ConfigError(f"--checkpointing {asked!r}: expected none, all, or up to {n_layers}, the model's layers.")
    return number


def _device(name: str) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--device {name!r} is not one of auto, cpu, cuda.{nearest(str(name), ('auto', 'cpu', 'cuda'))}"
        )
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _room(gigabytes: float | None, device: torch.device) -> int | None:
    """Bytes a rank has; None if it is not known."""
    if gigabytes is None:
        there = device.type == "cpu" or torch.cuda.is_available()
        return device_memory(device) if there else None
    if isinstance(gigabytes, bool) or not isinstance(gigabytes, (int, float)) or not gigabytes > 0:
        raise ConfigError(f"--device_memory {gigabytes!r}: expected GB, a number above 0.")
    return int(gigabytes * 1e9)


def _command() -> None:
    commands = {"plan": plan, "table": table, "compare": compare, "images": images}
    command = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in commands else "plan"
    from_command_line(commands[command])()


if __name__ == "__main__":
    run_tool(_command)
